"""What watches a run while it trains: losses that leap, weights that do not move, and no progress at all."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from mohawkify.errors import HANG, NumericsError

SPIKE = 6.0  # standard deviations above the mean of recent losses
MEMORY = 0.98  # weight of the past in the running mean and variance: about the last 50 steps
FEWEST_LOSSES = 20  # before that many a deviation means nothing
STEPS_BETWEEN_LOOKS = 50
SAMPLE_SIZE = 256


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


class MotionWatch:
    """Notices weights that should learn and stay where they are, and weights that should stay and move.

    It remembers a sample of every parameter, so it costs no second copy of the model.

    Args:
        trained: the parameters of the stage, by name.
        frozen: all others.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], frozen: Mapping[str, nn.Parameter]) -> None:
        self.trained, self.frozen = trained, frozen
        self._first = {name: _sample(parameter) for name, parameter in {**trained, **frozen}.items()}
        self._last = dict(self._first)
        self._unmoved = set(trained)

    def look(self, place: str) -> None:
        """Compare with the start of the stage and with the last look.

        Raises:
            NumericsError: a trained parameter has not moved since the start, none has since the last look, or a
                frozen one has moved.
        """
        now = {name: _sample(parameter) for name, parameter in {**self.trained, **self.frozen}.items()}
        moved = {name for name in self.trained if not torch.equal(now[name], self._last[name])}
        self._unmoved -= moved
        for name in self.frozen:
            if not torch.equal(now[name], self._first[name]):
                raise NumericsError(f"{name} has changed by {place}, though the stage does not train it")
        if not moved:
            raise NumericsError(f"no weight has changed by {place} since the last look", hint="is the learning rate 0?")
        if self._unmoved:
            raise NumericsError(
                f"{min(self._unmoved)} has not changed by {place}, though the stage should train it"
                + (f"; nor have {len(self._unmoved) - 1} more" if len(self._unmoved) > 1 else "")
            )
        self._last = now


def _sample(parameter: Tensor) -> Tensor:
    """Some of a parameter's numbers, evenly spread."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)].to("cpu", copy=True)


class HangWatch:
    """Ends the process where nothing gets done: exit code 75, with the stacks of all threads on standard error.

    Args:
        seconds: the longest time between two beats; 0 watches nothing.
        where: what is watched, for the message.
    """

    def __init__(self, seconds: float, where: str) -> None:
        self.seconds, self.where = seconds, where
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
                print(
                    f"error: no progress for {silent:.0f} s while {self.where}\n"
                    "hint: the newest checkpoint is intact and the same command continues; --patience says how"
                    " long to wait",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HANG)  # nothing else would end a thread that hangs
