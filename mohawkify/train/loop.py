"""The training loop, the only one: batches in their global order, one optimiser step after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from mohawkify.data.loader import SampleRange, read_batches
from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.objectives.objective import Runner, Stage
from mohawkify.recipe.schema import Recipe, StageRecipe
from mohawkify.train.checks import require_finite, require_gradients
from mohawkify.train.engines.engine import Engine
from mohawkify.train.schedule import learning_rate
from mohawkify.train.watchdog import STEPS_BETWEEN_LOOKS, DeadWeightCheck


@dataclass(frozen=True)
class StepReport:
    """What happened in one step.

    Args:
        step: number of the step within its stage, from 1.
        tokens: tokens of this step.
        learning_rate: the rate it was taken with.
        gradient_norm: before clipping.
        seconds: its duration.
        metrics: ``loss`` and the stage's other metrics.
    """

    step: int
    tokens: int
    learning_rate: float
    gradient_norm: float
    seconds: float
    metrics: dict[str, float]


def run_stage(
    stage: Stage,
    engine: Engine,
    ranges: list[SampleRange],
    stage_recipe: StageRecipe,
    recipe: Recipe,
    *,
    world: World,
    device: torch.device,
    micro_batch: int,
    first_step: int,
    frozen: Iterable[str],
    on_micro_batch: Callable[[], None],
    on_step: Callable[[StepReport], bool],
    on_refused: Callable[[int, dict[str, float], list[int]], None],
) -> None:
    """Train one stage from a given step to its end, or to where `on_step` leaves it.

    Batch and learning rate are pure functions of the step, so a resumed stage does what the uninterrupted one would.
    Each process takes its rows of the global batch, the same number in all, and the same number of micro-batches.

    Args:
        stage: what is computed.
        engine: holds gradients and optimiser.
        ranges: what is read, in order.
        stage_recipe: batch size and peak learning rate.
        recipe: seed and schedule.
        world: the processes that share each batch; their number divides it.
        device: where batches go.
        micro_batch: sequences per forward pass in one process.
        first_step: steps already taken.
        frozen: names of the student's parameters that this stage leaves alone.
        on_micro_batch: called before each micro-batch; may raise to stop, and the step it was in counts for nothing.
        on_step: called after each step; says whether to leave here, since the next step is not the next one planned;
            may raise to stop.
        on_refused: called before the error where a step has a figure that is not finite: with its number from 1, its
            metrics, and which sequences of the text it read.

    Raises:
        NumericsError: a loss or gradient is not finite, a parameter has no gradient, or weights do not move.
    """
    num_steps = sum(sample_range.num_steps for sample_range in ranges)
    trained = list(stage.parameters())
    motion: DeadWeightCheck | None = None  # from the first batch that counts for anything
    batches = read_batches(
        ranges,
        batch_sequences=stage_recipe.batch_sequences,
        seed=recipe.seed,
        first_step=first_step,
        num_workers=recipe.compute.data_workers,
    )
    with closing(batches):  # its threads end with the stage, however that ends
        for step in range(first_step, num_steps):
            begin = time.perf_counter()
            place = f"step {step + 1} of stage {stage.name}"
            batch = next(batches)
            with engine.accumulating():
                totals = _passes(stage, engine, batch, world, device, micro_batch, on_micro_batch)
            rate = learning_rate(step, num_steps, stage_recipe.learning_rate, recipe.schedule)
            metrics, sequences = {**totals, "learning_rate": rate}, batch.sequences.tolist()
            require_finite(totals, place, partial(on_refused, step + 1, metrics, sequences))
            if motion is None and stage.weight(batch):
                require_gradients(engine, trained, world, place)
                motion = DeadWeightCheck(engine, trained, frozen, world)
            norm = engine.step(rate)
            metrics["gradient_norm"] = norm
            require_finite({"the gradient norm": norm}, place, partial(on_refused, step + 1, metrics, sequences))
            if motion is not None:
                motion.step(rate)
                if (step + 1) % STEPS_BETWEEN_LOOKS == 0 or step + 1 == num_steps:
                    motion.look(place)
            seconds = time.perf_counter() - begin
            if on_step(StepReport(step + 1, batch.input_ids.numel(), rate, norm, seconds, totals)):
                return


def _passes(
    stage: Stage,
    engine: Engine,
    batch: Batch,
    world: World,
    device: torch.device,
    micro_batch: int,
    on_micro_batch: Callable[[], None],
) -> dict[str, float]:
    """Forward and backward of this process's rows of a batch; returns the metrics of the whole batch."""
    rows = len(batch.input_ids) // world.size
    first, end = world.rank * rows, (world.rank + 1) * rows
    weight = stage.weight(batch)
    totals: dict[str, float] = {}
    for begin in range(first, end, micro_batch):
        on_micro_batch()
        part = Batch(*(tensor[begin : min(begin + micro_batch, end)] for tensor in batch))
        share = stage.weight(part) / weight if weight else 0.0  # in chats no prediction of a whole batch may count

        def backward(loss: torch.Tensor, share: float = share) -> None:
            engine.backward(loss * share)

        with engine.autocast():
            metrics = stage.run(Batch(*(tensor.to(device) for tensor in part)), Runner(backward, engine.call))
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * share
    return world.sum(totals)
