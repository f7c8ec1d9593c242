"""Weights that should learn and stay where they are, and weights that should stay and move."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mohawkify.errors import NumericsError
from mohawkify.train.engine import Engine
from mohawkify.train.world import World

STEPS_BETWEEN_LOOKS = 50
SAMPLE_SIZE = 256
MOVES = 8.0  # a learning rate of so many roundings moves a weight for certain: Adam's first steps are about the rate


class MotionWatch:
    """Notices weights that should learn and stay where they are, and weights that should stay and move.

    It remembers some numbers of every parameter: of a trained one those with the largest gradients of the present step,
    since the text of a few steps reaches only some rows of an embedding. So it costs no second copy of the model. Each
    process looks at its own part of the weights, and all decide together.

    Args:
        engine: holds the parameters, and the gradients of the present step.
        trained: names of the parameters of the stage.
        frozen: names of all others.
        world: the processes.
    """

    def __init__(self, engine: Engine, trained: Collection[str], frozen: Collection[str], world: World) -> None:
        self._samples = {
            name: _Sample(engine, name, _largest(engine.gradient(name), engine.shard(name))) for name in trained
        }
        self._frozen = {name: _Sample(engine, name, _evenly_spread(engine.shard(name))) for name in frozen}
        self._world = world
        self._unmoved = set(trained)
        self._largest_rate = 0.0

    def step(self, learning_rate: float) -> None:
        """Take note of a step's rate: where all were below the rounding of a weight, it need not move."""
        self._largest_rate = max(self._largest_rate, learning_rate)

    def look(self, place: str) -> None:
        """Compare with the first step that was watched and with the last look.

        Raises:
            NumericsError: a trained parameter has not moved though it had the rate for it, none has since the last
                look, or a frozen one has moved.
        """
        for name in self._moved(self._frozen):
            raise NumericsError(f"{name} has changed by {place}, though the stage does not train it")
        moved = self._moved(self._samples)
        self._unmoved -= moved
        if not moved:
            raise NumericsError(f"no weight has changed by {place} since the last look", hint="is the learning rate 0?")
        # One process may hold a part of a weight that the rate cannot move, and another one that it can.
        able = {name: float(self._largest_rate > MOVES * self._samples[name].rounding()) for name in self._samples}
        stuck = sorted(name for name, number in self._world.sum(able).items() if number and name in self._unmoved)
        if stuck:
            more = f"; nor have {len(stuck) - 1} more" if len(stuck) > 1 else ""
            raise NumericsError(f"{stuck[0]} has not changed by {place}, though the stage should train it{more}")

    def _moved(self, samples: dict[str, _Sample]) -> set[str]:
        """The names of those that have moved in any process."""
        found = self._world.sum({name: float(sample.has_moved()) for name, sample in samples.items()})
        return {name for name, number in found.items() if number}


class _Sample:
    """Some numbers of this process's part of a parameter as they were at the last look."""

    def __init__(self, engine: Engine, name: str, places: Tensor) -> None:
        self._engine, self._name, self._places = engine, name, places
        self._values = self._read()

    def has_moved(self) -> bool:
        """Whether any of them has changed since the last look; remembers what they are now."""
        before, self._values = self._values, self._read()
        return not torch.equal(before, self._values)

    def rounding(self) -> float:
        """The distance of neighbouring numbers near the largest of them; infinite where there are none."""
        if not self._values.numel():
            return float("inf")
        return float(self._values.abs().max()) * torch.finfo(self._values.dtype).eps

    def _read(self) -> Tensor:
        return self._engine.shard(self._name).flatten()[self._places].to("cpu", copy=True)


def _largest(gradient: Tensor | None, shard: Tensor) -> Tensor:
    if gradient is None or gradient.numel() != shard.numel():
        return _evenly_spread(shard)
    sizes = gradient.flatten().abs()
    return sizes.topk(min(SAMPLE_SIZE, sizes.numel())).indices


def _evenly_spread(shard: Tensor) -> Tensor:
    numbers = shard.numel()
    return torch.arange(0, numbers, max(1, numbers // SAMPLE_SIZE), device=shard.device)
