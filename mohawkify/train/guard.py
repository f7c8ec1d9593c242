"""Guards against runs that look alive but learn nothing, or learn from numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mohawkify.errors import NumericsError
from mohawkify.train.engine import Engine
from mohawkify.train.world import World


def require_finite(figures: Mapping[str, float], place: str) -> None:
    """Raise NumericsError when a figure of the step is not finite; called before the weights are touched."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"{name} is {value} at {place}; the weights were not updated with it",
                hint="the newest checkpoint is from before this step; try a lower learning rate or fp32",
            )


def require_gradients(engine: Engine, trained: Collection[str], world: World, place: str) -> None:
    """Raise NumericsError when a parameter that should learn has no gradient; checked once per stage and start."""
    found = world.sum({name: float(_has_gradient(engine.gradient(name))) for name in trained})
    for name, number in found.items():
        if number == 0:
            raise NumericsError(f"{name} has no gradient at {place}: the stage would not train it")


def _has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.count_nonzero(gradient))
