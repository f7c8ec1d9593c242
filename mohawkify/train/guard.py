"""Guards against runs that look alive but learn nothing, or learn from numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from mohawkify.errors import NumericsError


def require_finite(figures: Mapping[str, float], place: str) -> None:
    """Raise NumericsError when a figure of the step is not finite; called before the weights are touched."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"{name} is {value} at {place}; the weights were not updated with it",
                hint="the newest checkpoint is from before this step; try a lower learning rate or fp32",
            )


def require_gradients(parameters: Mapping[str, nn.Parameter], place: str) -> None:
    """Raise NumericsError when a parameter that should learn has no gradient; checked once per stage and start."""
    for name, parameter in parameters.items():
        if parameter.grad is None or not torch.count_nonzero(parameter.grad):
            raise NumericsError(f"{name} has no gradient at {place}: the stage would not train it")
