"""Detects losses that leap, weights that do not move, and processes that hang."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from mohawkify.distributed.process_group import World
from mohawkify.errors import HANG, NumericsError
from mohawkify.train.engines.engine import Engine

SPIKE = 6.0  # standard deviations above the mean of recent losses
MEMORY = 0.98  # weight of the past in the running mean and variance: about the last 50 steps
RISE = 1.2  # of the loss within the first tenth of a stage: more than batches of text differ
FEWEST_LOSSES = 20  # before that many a deviation means nothing
STEPS_BETWEEN_CHECKS = 50
SAMPLE_SIZE = 256
MOVES = 8.0  # a learning rate of so many roundings moves a weight for certain: Adam's first steps are about the rate


@dataclass
class SpikeDetector:
    """A running mean and variance of a stage's loss; every checkpoint keeps it.

    Args:
        num_losses: losses so far.
        mean: their running mean.
        variance: their running variance.
    """

    num_losses: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> float | None:
        """Add a loss.

        Returns:
            The standard deviations by which it leaps above the recent ones; None where it does not.
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


class RiseCheck:
    """Detects a loss that rises at the beginning of a stage, as it does where the learning rate is too high.

    Args:
        num_steps: of the stage.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_losses = max(num_steps // 10, 4)
        self._losses: list[float] = []

    def add(self, loss: float) -> float | None:
        """Add a loss of the stage, from its first step on.

        Returns:
            The factor by which the loss rose, once, at the end of the first tenth; None everywhere else.
        """
        if len(self._losses) == self._num_losses:
            return None
        self._losses.append(loss)
        if len(self._losses) < self._num_losses:
            return None
        few = max(1, self._num_losses // 3)
        rise = sum(self._losses[-few:]) / sum(self._losses[:few])
        return rise if rise > RISE else None


class DeadWeightCheck:
    """Detects trained weights that do not change, and frozen weights that do.

    It keeps some elements of every parameter: of a trained one those with the largest gradients of the present step,
    since the text of a few steps reaches only some rows of an embedding. So it needs no second copy of the model. Every
    process compares its own part of a sharded parameter, and all raise the same error.

    Args:
        engine: holds the parameters; begins with the gradients of the present step, before it is taken.
        trained: names of the parameters of the stage.
        frozen: names of all others.
        world: the processes.
    """

    def __init__(self, engine: Engine, trained: Iterable[str], frozen: Iterable[str], world: World) -> None:
        self._world = world
        self._samples = {name: _Sample(engine, name, _largest_gradients(engine, name)) for name in trained}
        self._frozen = {name: _Sample(engine, name, _evenly_spread(engine.shard(name))) for name in frozen}
        self._unmoved = set(self._samples)
        self._largest_rate = self._recent_rate = 0.0

    def add_step(self, learning_rate: float) -> None:
        """Add a step's rate: a weight need not change where all rates were below its rounding."""
        self._largest_rate = max(self._largest_rate, learning_rate)
        self._recent_rate = max(self._recent_rate, learning_rate)

    def check(self, where: str) -> None:
        """Compare with the first step and with the last check.

        Raises:
            NumericsError: a trained parameter has not moved though it had the rate for it, none has since the last
                check, or a frozen one has moved; in all processes.
        """
        for name in self._anywhere({name: sample.has_moved() for name, sample in self._frozen.items()}):
            raise NumericsError(f"{name} has changed by {where}, though the stage does not train it")
        moved = self._anywhere({name: sample.has_moved() for name, sample in self._samples.items()})
        self._unmoved -= moved.keys()
        if not moved and (not self._recent_rate or self._could_move(self._samples, self._recent_rate)):
            raise NumericsError(
                f"no weight has changed by {where} since the last check", hint="is the learning rate 0?"
            )
        self._recent_rate = 0.0
        could = self._could_move(self._unmoved, self._largest_rate)
        if could:
            more = f"; nor have {len(could) - 1} more" if len(could) > 1 else ""
            raise NumericsError(
                f"{next(iter(could))} has not changed by {where}, though the stage should train it{more}"
            )

    def _could_move(self, names: Iterable[str], rate: float) -> dict[str, float]:
        """The names of weights that such a learning rate moves for certain, in a process."""
        return self._anywhere({name: rate > MOVES * self._samples[name].rounding() for name in sorted(names)})

    def _anywhere(self, flags: dict[str, bool]) -> dict[str, float]:
        """The names whose flag is set in a process."""
        return {name: count for name, count in self._world.sum(flags).items() if count}


class _Sample:
    """Some elements of a parameter, as they were at the last check."""

    def __init__(self, engine: Engine, name: str, positions: Tensor) -> None:
        self._engine, self._name, self._positions = engine, name, positions
        self._values = self._read()

    def has_moved(self) -> bool:
        """Whether any of them has changed since the last check; keeps their new values."""
        before, self._values = self._values, self._read()
        return not torch.equal(before, self._values)

    def rounding(self) -> float:
        """The spacing of floats near the largest of them; infinite where there are none."""
        if not self._values.numel():
            return math.inf
        return float(self._values.abs().max()) * torch.finfo(self._values.dtype).eps

    def _read(self) -> Tensor:
        values = self._engine.shard(self._name).flatten()
        return values[self._positions.to(values.device)].to("cpu", copy=True)


def _largest_gradients(engine: Engine, name: str) -> Tensor:
    gradient = engine.gradient(name)
    if gradient is None:
        return _evenly_spread(engine.shard(name))
    sizes = gradient.detach().flatten().abs()
    return sizes.topk(min(SAMPLE_SIZE, sizes.numel())).indices


def _evenly_spread(values: Tensor) -> Tensor:
    size = values.numel()
    return torch.arange(0, size, max(1, size // SAMPLE_SIZE), device=values.device)


class Watchdog:
    """Ends a process that hangs: exit code 75, with the stacks of all threads on standard error.

    Time is counted in its own checks, not by the clock: a process that was stopped by Ctrl-Z and goes on did not hang.

    Args:
        seconds: the longest time between two heartbeats; 0 for never.
        doing: what the process does, for the message.
        world: the processes that end with this one.
    """

    def __init__(self, seconds: float, doing: str, world: World) -> None:
        self.seconds, self.doing, self.world = seconds, doing, world
        self._heartbeats = 0
        self._is_paused = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def heartbeat(self) -> None:
        """Restart the time."""
        self._heartbeats += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block there is no timeout: a library that loads a model gives no heartbeat until it is done."""
        self._is_paused = True
        try:
            yield
        finally:
            self.heartbeat()
            self._is_paused = False

    def _watch(self) -> None:
        seconds = min(1.0, self.seconds / 4)
        last, silent = self._heartbeats, 0.0
        while not self._over.wait(seconds):
            is_alive = self._heartbeats != last or self._is_paused
            last, silent = self._heartbeats, 0.0 if is_alive else silent + seconds
            if is_alive and self.world.is_rank0:
                self.world.heartbeat()
            if silent > self.seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self.world.failures is None:
            self._report(silent)
        else:
            self.world.failures.report(HANG, lambda: self._report(silent), "hang")
        os._exit(HANG)  # nothing else would end a thread that hangs

    def _report(self, silent: float) -> None:
        print(
            f"error: no progress for {silent:.0f} s while {self.doing}\n"
            "hint: the newest checkpoint is intact and the same command continues; --hang-timeout says how"
            " long to wait",
            file=sys.stderr,
            flush=True,
        )
