"""Finds the learning rate of a stage: a few steps at each of several rates, from the same weights on the same text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mohawkify.data.loader import batch_at
from mohawkify.data.packing import Batch
from mohawkify.errors import DataError
from mohawkify.objectives.objective import Objective
from mohawkify.planning.rules import RangeRules
from mohawkify.train.conversion import Conversion
from mohawkify.train.engines.choice import build_engine
from mohawkify.train.loop import Stage, forward_backward

MOST_BATCHES_LOOKED_AT = 10  # for each that is needed


@dataclass(frozen=True)
class RangeTest:
    """A range test; every process of a run makes the same calls.

    Args:
        conversion: the run. Its student is as the stage finds it, and is left so.
        stage: the stage.
        micro_batch: sequences per forward pass in one process.
        check: called before every pass; it may raise to stop.
        rules: which rates are tried.
    """

    conversion: Conversion
    stage: Stage
    micro_batch: int
    check: Callable[[], None]
    rules: RangeRules

    def run(self) -> dict[str, Any]:
        """Try the rates.

        Returns:
            A JSON object: ``learning_rate``, the stage's, and what it was chosen from. ``rates`` has a row for every
            rate; its ``loss`` is null where it was not finite, and it is ``refused`` where the loss did not fall.
        """
        begin = time.perf_counter()
        block = self.stage.objective.block
        steps = self.rules.steps(block)
        objective, batches = self.stage.objective, self._batches(steps + 1)
        weights = {name: p.detach().to("cpu", copy=True) for name, p in objective.parameters().items()}
        start = self._loss_after(objective, weights, batches[-1:], 0.0)
        losses: dict[float, float] = {}
        for rates in self.rules.walks():
            for rate in rates:
                best = min(losses.values(), default=math.inf)
                losses[rate] = self._loss_after(objective, weights, batches, rate)
                if not losses[rate] < best:
                    break
        return {
            "learning_rate": self.rules.best(losses, start, block.tokens / (steps * block.tokens_per_step)),
            "start_loss": start,
            "steps": steps,
            "tokens": sum(batch.input_ids.numel() for batch in batches) * len(losses),
            "seconds": time.perf_counter() - begin,
            "rates": [
                {
                    "learning_rate": rate,
                    "loss": losses[rate] if math.isfinite(losses[rate]) else None,
                    "refused": not losses[rate] < start,
                }
                for rate in sorted(losses)
            ],
        }

    def _batches(self, count: int) -> list[Batch]:
        """The stage's first batches in which a prediction counts, again where they are few."""
        objective, seed = self.stage.objective, self.conversion.recipe.seed
        block = objective.block
        found: list[Batch] = []
        for step in range(min(block.num_steps, MOST_BATCHES_LOOKED_AT * count)):
            batch = batch_at(self.stage.ranges, step, block.batch_sequences, seed)
            found += [batch] if objective.weight(batch) else []
            if len(found) == count:
                return found
        if not found:
            raise DataError(
                f"in the first batches of stage {self.stage.name} no prediction counts: its rate cannot be found",
                hint=f"give stages.{self.stage.name}.learning_rate a number",
            )
        return [found[index % len(found)] for index in range(count)]

    def _loss_after(self, objective: Objective, weights: dict[str, Tensor], batches: list[Batch], rate: float) -> float:
        """The loss on the last batch after a step on each of the others; infinite where a number is not finite.

        Every rate has an engine of its own: nothing of an optimizer is left to the next.
        """
        conversion, device = self.conversion, self.conversion.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            engine = build_engine(objective, conversion.recipe, self.micro_batch, device, conversion.world)
            passes = (conversion, objective, engine)
            try:
                for batch in batches[:-1]:
                    with engine.accumulating():
                        forward_backward(*passes, batch, self.micro_batch, self.check)
                    if not math.isfinite(engine.step(rate)):
                        return math.inf
                with torch.no_grad():
                    metrics = forward_backward(*passes, batches[-1], self.micro_batch, self.check)
            finally:
                engine.close()
                with torch.no_grad():
                    for name, parameter in objective.parameters().items():
                        parameter.copy_(weights[name])
                        parameter.grad = None
        loss = metrics.get("kl", metrics["loss"])
        return loss if math.isfinite(loss) else math.inf
