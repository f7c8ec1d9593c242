"""Guards against runs that look alive but learn nothing, or learn from numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from mohawkify.distributed.process_group import World
from mohawkify.errors import NumericsError
from mohawkify.train.engines.engine import Engine


def require_finite(metrics: Mapping[str, float], place: str, refused: Callable[[], None] = lambda: None) -> None:
    """Refuse metrics of a step that are not finite; called before the weights are touched.

    Args:
        metrics: by name.
        place: which step, in words.
        refused: called where one is refused, so that the log can say so.

    Raises:
        NumericsError: names the first one.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            refused()
            raise NumericsError(
                f"{name} is {value} at {place}; the weights were not updated with it",
                hint="the newest checkpoint is from before this step; try a lower learning rate or fp32",
            )


def require_gradients(engine: Engine, names: Iterable[str], world: World, place: str) -> None:
    """Raise NumericsError in all processes where a parameter that should learn has no gradient in any of them.

    Called once per stage and start, before the step. It catches gradients that get lost on the way, as those of all
    layers but the last do where DeepSpeed is not told of several backward passes.
    """
    found = {}
    for name in names:
        gradient = engine.gradient(name)
        found[name] = 0.0 if gradient is None else float(torch.count_nonzero(gradient) > 0)
    without = [name for name, processes in world.sum(found).items() if not processes]
    if without:
        more = f", nor have {len(without) - 1} more" if len(without) > 1 else ""
        raise NumericsError(f"{without[0]} has no gradient at {place}{more}: the stage would not train it")
