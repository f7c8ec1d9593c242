"""The training loop, the only one: batches in their global order, one optimiser step after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mohawkify.data.packing import Batch
from mohawkify.data.reading import Stretch, read_batches
from mohawkify.recipe import Recipe, StageRecipe
from mohawkify.stages.base import Runner, Stage
from mohawkify.train.engine import Engine
from mohawkify.train.guard import require_finite, require_gradients
from mohawkify.train.schedule import learning_rate
from mohawkify.train.watch import STEPS_BETWEEN_LOOKS, MotionWatch


@dataclass(frozen=True)
class StepReport:
    """What happened in one step.

    Args:
        step: number of the step within its stage, from 1.
        tokens: tokens of this step.
        learning_rate: the rate it was taken with.
        gradient_norm: before clipping.
        seconds: its duration.
        figures: ``loss`` and the stage's other figures.
    """

    step: int
    tokens: int
    learning_rate: float
    gradient_norm: float
    seconds: float
    figures: dict[str, float]


def run_stage(
    stage: Stage,
    engine: Engine,
    stretches: list[Stretch],
    stage_recipe: StageRecipe,
    recipe: Recipe,
    *,
    device: torch.device,
    first_step: int,
    frozen: dict[str, nn.Parameter],
    on_micro_batch: Callable[[], None],
    on_step: Callable[[StepReport], bool],
) -> None:
    """Train one stage from a given step to its end, or to where `on_step` leaves it.

    Batch and learning rate are pure functions of the step, so a resumed stage does what the uninterrupted one would.

    Args:
        stage: what is computed.
        engine: holds gradients and optimiser.
        stretches: what is read, in order.
        stage_recipe: batch size and peak learning rate.
        recipe: seed, schedule and micro-batch.
        device: where batches go.
        first_step: steps already taken.
        frozen: the student's parameters that this stage leaves alone.
        on_micro_batch: called before each micro-batch; may raise to stop, and the step it was in counts for nothing.
        on_step: called after each step; says whether to leave here, since the next step is not the next one planned;
            may raise to stop.

    Raises:
        NumericsError: a loss or gradient is not finite, a parameter has no gradient, or weights do not move.
    """
    num_steps = sum(stretch.num_steps for stretch in stretches)
    parameters = stage.parameters()
    batches = read_batches(
        stretches,
        batch_sequences=stage_recipe.batch_sequences,
        seed=recipe.seed,
        first_step=first_step,
        num_workers=recipe.compute.data_workers,
    )
    for step in range(first_step, num_steps):
        begin = time.perf_counter()
        place = f"step {step + 1} of stage {stage.name}"
        batch = next(batches)
        micro = recipe.compute.micro_batch_sequences or stage_recipe.batch_sequences
        weight = stage.weight(batch)
        totals: dict[str, float] = {}
        for first in range(0, stage_recipe.batch_sequences, micro):
            on_micro_batch()
            part = Batch(*(tensor[first : first + micro] for tensor in batch))
            share = stage.weight(part) / weight

            def backward(loss: torch.Tensor, share: float = share) -> None:
                engine.backward(loss * share)

            with engine.autocast():
                figures = stage.run(Batch(*(tensor.to(device) for tensor in part)), Runner(backward, engine.call))
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + float(value) * share
        require_finite(totals, place)
        if step == first_step:
            require_gradients(parameters, place)
            motion = MotionWatch(parameters, frozen)
        rate = learning_rate(step, num_steps, stage_recipe.learning_rate, recipe.schedule)
        norm = engine.step(rate)
        require_finite({"the gradient norm": norm}, place)
        motion.step(rate)
        if (step + 1) % STEPS_BETWEEN_LOOKS == 0 or step + 1 == num_steps:
            motion.look(place)
        seconds = time.perf_counter() - begin
        if on_step(StepReport(step + 1, batch.input_ids.numel(), rate, norm, seconds, totals)):
            return
