"""Stop on request: the first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from mohawkify.distributed.process_group import World
from mohawkify.errors import MohawkifyError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(MohawkifyError):
    """The run was asked to stop, saved itself and left; the exit code is 128 + the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, hint="the same command continues it")
        self.exit_code = 128 + number


class Shutdown:
    """Within the block, remembers the first signal; a second one ends the process at once.

    While ``at_once`` is set the first one also raises KeyboardInterrupt; should a library that catches everything
    swallow it, the request is obeyed at the next place that looks. The handler is set where a shell has told its
    background jobs to ignore Ctrl-C, too: Python would not take it there (found by killing).
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = True
        self._before: dict[int, object] = {}

    def __enter__(self) -> Shutdown:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self, place: str) -> None:
        """Raise Interrupted if a stop was requested; ``place`` says where the run stands."""
        if self.number is not None:
            raise Interrupted(f"stopped {place}", self.number)

    def end_at_once(self, place: str) -> None:
        """From here on let a signal end the process at once; obey one that has come."""
        self.at_once = True
        self.check(place)

    def any_rank(self, world: World) -> bool:
        """Whether any process was asked to stop; all of them are then."""
        agreed = int(world.largest(float(self.number or 0)))
        if agreed:  # a signal that came in the meantime waits for the next time
            self.number = agreed
        return bool(agreed)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self.at_once:
            raise KeyboardInterrupt
