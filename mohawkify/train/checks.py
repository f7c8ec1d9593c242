"""Checks of a step: its metrics are finite, and every parameter that should learn has a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from mohawkify.distributed.process_group import World
from mohawkify.errors import NumericsError
from mohawkify.train.engines.engine import Engine


class RefusedStepError(NumericsError):
    """A step whose loss or gradient norm is not finite.

    Args:
        message: one line.
        metrics: all metrics of the step.
        sequences: the sequences of the text that it read.
    """

    def __init__(self, message: str, metrics: Mapping[str, float], sequences: list[int]) -> None:
        super().__init__(
            message, hint="the newest checkpoint is from before this step; try a lower learning rate or fp32"
        )
        self.metrics, self.sequences = metrics, sequences


def require_finite(values: Mapping[str, float], where: str, metrics: Mapping[str, float], sequences: list[int]) -> None:
    """Raise RefusedStepError for the first value that is not finite; called before the weights are touched.

    Args:
        values: what is checked, by name.
        where: which step, in words.
        metrics: all metrics of the step.
        sequences: the sequences of the text that it read.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            message = f"{name} is {value} at {where}; the weights were not updated with it"
            raise RefusedStepError(message, metrics, sequences)


def require_gradients(engine: Engine, names: Iterable[str], world: World, where: str) -> None:
    """Raise NumericsError in all processes where a parameter that should learn has no gradient in any of them.

    Called once per stage and start, before the step. It detects gradients that are lost on the way, such as those of
    all layers but the last where DeepSpeed expects a single backward pass.
    """
    has_gradient = {}
    for name in names:
        gradient = engine.gradient(name)
        has_gradient[name] = 0.0 if gradient is None else float(torch.count_nonzero(gradient) > 0)
    without = [name for name, processes in world.sum(has_gradient).items() if not processes]
    if without:
        more = f", nor have {len(without) - 1} more" if len(without) > 1 else ""
        raise NumericsError(f"{without[0]} has no gradient at {where}{more}: the stage would not train it")
