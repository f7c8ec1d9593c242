"""The training loop, the only one: a generator that takes one optimizer step after the other, in their global order."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import torch

from mohawkify.data.loader import SampleRange, read_batches
from mohawkify.data.packing import Batch
from mohawkify.objectives.objective import Objective, Runner
from mohawkify.train.checks import require_finite, require_gradients
from mohawkify.train.conversion import Conversion
from mohawkify.train.engines.engine import Engine
from mohawkify.train.schedule import learning_rate
from mohawkify.train.watchdog import STEPS_BETWEEN_CHECKS, DeadWeightCheck


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe, ready to train.

    Args:
        name: its key in the recipe.
        objective: its loss and the parameters that it trains.
        ranges: the text that it reads, in order.
        learning_rate: its peak; None until it is known.
    """

    name: str
    objective: Objective
    ranges: list[SampleRange]
    learning_rate: float | None = None


@dataclass(frozen=True)
class StepReport:
    """One step that was taken.

    Args:
        step: number of the step within its stage, from 1.
        tokens: tokens of this step.
        learning_rate: the rate of its optimizer step.
        gradient_norm: before clipping.
        seconds: its duration.
        metrics: ``loss`` and the objective's other metrics; none where no prediction counts: nothing is updated then.
    """

    step: int
    tokens: int
    learning_rate: float
    gradient_norm: float
    seconds: float
    metrics: dict[str, float]


def steps(
    conversion: Conversion,
    stage: Stage,
    engine: Engine,
    micro_batch: int,
    first_step: int,
    check: Callable[[], None],
) -> Generator[StepReport]:
    """Train a stage from a step to its end, and yield a report after every step.

    Batch and learning rate are pure functions of the step, so a resumed stage does what the uninterrupted one would.
    Each process takes its rows of the global batch, the same number in all, and the same number of micro-batches. Close
    the generator when it is left before its end: it reads batches ahead in threads.

    Args:
        conversion: recipe, processes and device.
        stage: what is trained.
        engine: holds gradients and optimizer.
        micro_batch: sequences per forward pass in one process.
        first_step: steps of the stage that are already taken.
        check: called before each micro-batch; it may raise to stop, and the step under way is then lost.

    Raises:
        RefusedStepError: a loss or gradient norm is not finite; the weights were not updated with it.
        NumericsError: a parameter has no gradient, or weights do not move.
    """
    recipe, world, objective = conversion.recipe, conversion.world, stage.objective
    block = objective.block
    assert stage.learning_rate is not None
    num_steps = sum(sample_range.num_steps for sample_range in stage.ranges)
    trained = list(objective.parameters())
    frozen = [name for name, _ in objective.models.student.named_parameters() if name not in trained]
    motion: DeadWeightCheck | None = None  # begins with the first batch that has a prediction to learn from
    has_learned = False  # since the last check of motion
    batches = read_batches(
        stage.ranges,
        batch_sequences=block.batch_sequences,
        seed=recipe.seed,
        first_step=first_step,
        num_workers=recipe.compute.data_workers,
    )
    with closing(batches):
        for step in range(first_step, num_steps):
            begin = time.perf_counter()
            where = f"step {step + 1} of stage {stage.name}"
            batch = next(batches)
            rate = learning_rate(step, num_steps, stage.learning_rate, recipe.schedule)
            totals: dict[str, float] = {}
            norm = 0.0
            if objective.weight(batch) == 0:  # prompts alone: without a step, since AdamW decays weights in any
                check()
            else:
                with engine.accumulating():
                    totals = forward_backward(conversion, objective, engine, batch, micro_batch, check)
                metrics, sequences = {**totals, "learning_rate": rate}, batch.sequences.tolist()
                require_finite(totals, where, metrics, sequences)
                if motion is None:
                    require_gradients(engine, trained, world, where)
                    motion = DeadWeightCheck(engine, trained, frozen, world)
                norm = engine.step(rate)
                require_finite({"the gradient norm": norm}, where, {**metrics, "gradient_norm": norm}, sequences)
                motion.add_step(rate)
                has_learned = True
            if motion is not None and has_learned and ((step + 1) % STEPS_BETWEEN_CHECKS == 0 or step + 1 == num_steps):
                motion.check(where)
                has_learned = False
            seconds = time.perf_counter() - begin
            yield StepReport(step + 1, batch.input_ids.numel(), rate, norm, seconds, totals)


def forward_backward(
    conversion: Conversion,
    objective: Objective,
    engine: Engine,
    batch: Batch,
    micro_batch: int,
    check: Callable[[], None],
) -> dict[str, float]:
    """Forward and backward of this process's rows of a batch; returns the metrics of the whole batch.

    Under ``torch.no_grad`` nothing is differentiated where the objective can do without.
    """
    world = conversion.world
    rows = len(batch.input_ids) // world.size
    first, end = world.rank * rows, (world.rank + 1) * rows
    weight = objective.weight(batch)
    totals: dict[str, float] = {}
    for begin in range(first, end, micro_batch):
        check()
        part = Batch(*(tensor[begin : min(begin + micro_batch, end)] for tensor in batch))
        share = objective.weight(part) / weight

        def backward(loss: torch.Tensor, share: float = share) -> None:
            if loss.requires_grad:
                engine.backward(loss * share)

        with engine.autocast():
            on_device = Batch(*(tensor.to(conversion.device) for tensor in part))
            metrics = objective.run(on_device, Runner(backward, engine.call))
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * share
    return world.sum(totals)
