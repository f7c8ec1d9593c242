"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from mohawkify.recipe.schema import ScheduleRecipe


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """Warm-up, stable, decay: linear up over the first steps, constant, linear down to the floor over the last.

    Args:
        step: the step about to be taken, from 0.
        num_steps: steps of the whole stage.
        peak: the rate of the stable part.
        schedule: fractions of warm-up and decay, and the floor.

    Returns:
        The learning rate of this step.

    Source: Llamba (arXiv 2502.14458), section 4.2.
    """
    rising, decay_steps = warmup_steps(num_steps, schedule), num_steps - decay_step(num_steps, schedule)
    if step < rising:
        return peak * (step + 1) / rising
    remaining = num_steps - step
    if remaining <= decay_steps:
        return schedule.floor + (peak - schedule.floor) * remaining / (decay_steps + 1)
    return peak


def warmup_steps(num_steps: int, schedule: ScheduleRecipe) -> int:
    """The number of steps in which the learning rate rises."""
    return round(schedule.warmup * num_steps)


def decay_step(num_steps: int, schedule: ScheduleRecipe) -> int:
    """The step from which on the learning rate falls; the number of steps where it never does."""
    return num_steps - round(schedule.decay * num_steps)
