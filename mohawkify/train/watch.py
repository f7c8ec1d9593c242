"""What watches a run while it trains: losses that leap, and no progress at all."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from mohawkify.errors import HANG
from mohawkify.train.world import World

SPIKE = 6.0  # standard deviations above the mean of recent losses
MEMORY = 0.98  # weight of the past in the running mean and variance: about the last 50 steps
FEWEST_LOSSES = 20  # before that many a deviation means nothing


@dataclass
class LossWatch:
    """A running mean and variance of a stage's loss; its numbers go into every checkpoint.

    Args:
        num_losses: losses seen.
        mean: their running mean.
        variance: their running variance.
    """

    num_losses: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def see(self, loss: float) -> float | None:
        """Take one more loss.

        Returns:
            By how many standard deviations it leaps above the recent ones, or None where it does not.
        """
        deviation = loss - self.mean
        spread = math.sqrt(self.variance)
        leaps = self.num_losses >= FEWEST_LOSSES and spread > 0 and deviation > SPIKE * spread
        past = MEMORY if self.num_losses else 0.0
        # A spike counts for no more than the limit: one bad batch must not hide the next.
        bounded = min(deviation, SPIKE * spread) if leaps else deviation
        self.mean += (1.0 - past) * bounded
        self.variance = past * (self.variance + (1.0 - past) * bounded**2)
        self.num_losses += 1
        return deviation / spread if leaps else None


class HangWatch:
    """Ends the process where nothing gets done: exit code 75, with the stacks of all threads on standard error.

    Args:
        seconds: the longest time between two beats; 0 watches nothing.
        where: what is watched, for the message.
        world: the processes that end with this one.
    """

    def __init__(self, seconds: float, where: str, world: World) -> None:
        self.seconds, self.where, self.world = seconds, where, world
        self._beat = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> HangWatch:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def beat(self) -> None:
        """Something got done."""
        self._beat = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._beat
            if silent > self.seconds:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                if self.world.alarm is None:
                    self._say(silent)
                else:
                    self.world.alarm.settle(HANG, lambda silent=silent: self._say(silent), "hang")  # type: ignore[misc]
                os._exit(HANG)  # nothing else would end a thread that hangs

    def _say(self, silent: float) -> None:
        print(
            f"error: no progress for {silent:.0f} s while {self.where}\n"
            "hint: the newest checkpoint is intact and the same command continues; --patience says how"
            " long to wait",
            file=sys.stderr,
            flush=True,
        )
