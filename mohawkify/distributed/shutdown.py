"""Stop on request: the first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from mohawkify.distributed.process_group import World
from mohawkify.errors import MohawkifyError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(MohawkifyError):
    """A signal stopped the run, which wrote a checkpoint; the exit code is 128 + the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, hint="the same command continues it")
        self.exit_code = 128 + number


class Shutdown:
    """Within the block, remembers the first signal; a second one ends the process at once.

    At first, and after `end_at_once`, the first one also raises KeyboardInterrupt; where a library catches that, the
    next `check` raises. Unlike Python's, the handler is set even where a shell makes its background jobs ignore Ctrl-C.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = True
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

    def check(self, where: str) -> None:
        """Raise Interrupted if a stop was requested; ``where`` is how far the run is, for the message."""
        if self.number is not None:
            raise Interrupted(f"stopped {where}", self.number)

    def defer(self) -> None:
        """From here on a signal is only remembered, until `check` raises."""
        self._at_once = False

    def end_at_once(self, where: str) -> None:
        """From here on a signal ends the process at once, and so does one that came before."""
        self._at_once = True
        self.check(where)

    def any_rank(self, world: World) -> bool:
        """Whether any process has received a signal; all of them then stop."""
        agreed = int(world.max(float(self.number or 0)))
        if agreed:  # a signal that comes after the exchange counts at the next one
            self.number = agreed
        return bool(agreed)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._at_once:
            raise KeyboardInterrupt
