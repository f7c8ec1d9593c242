"""How far a run is: the part of a checkpoint's state that moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from mohawkify.errors import CheckpointError
from mohawkify.plan.planner import STAGES
from mohawkify.run.checkpoint import Checkpoint
from mohawkify.train.plateau import PlateauDetector
from mohawkify.train.watchdog import SpikeDetector


@dataclass
class Position:
    """How far a run is; the part of a checkpoint's state that moves.

    Args:
        stage: the stage under way.
        stage_step: optimiser steps of its plan that are behind it.
        global_step: optimiser steps taken in all.
        tokens: tokens read in all.
        seconds: training time of each stage so far, by name.
        losses: running mean and variance of the stage's loss.
        plateau: what is known of the phase's loss.
        left_out: planned steps of the stage that saturated phases did not take, by text.
    """

    stage: str
    stage_step: int = 0
    global_step: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    losses: SpikeDetector = field(default_factory=SpikeDetector)
    plateau: PlateauDetector = field(default_factory=PlateauDetector)
    left_out: dict[str, int] = field(default_factory=dict)

    def has_finished(self, stage: str, num_steps: int) -> bool:
        """Whether a stage of so many planned steps is behind it."""
        if self.stage == stage:
            return self.stage_step == num_steps
        return bool(self.stage) and STAGES.index(stage) < STAGES.index(self.stage)


def read_position(saved: Checkpoint) -> Position:
    """How far a run was; the state may come from a stranger's folder, so every value is looked at.

    Raises:
        CheckpointError: it does not say so.
    """
    try:
        values = dict(saved.state["position"])
        watches = {"losses": SpikeDetector(**values["losses"]), "plateau": PlateauDetector(**values["plateau"])}
        position = Position(**{**values, **watches})
        plateau = position.plateau
        steps = (position.stage_step, position.global_step, position.tokens)
        counts = (*steps, position.losses.num_losses, plateau.num_losses, *position.left_out.values())
        metrics = (*position.seconds.values(), position.losses.mean, position.losses.variance, plateau.total)
        metrics += () if plateau.before is None else (plateau.before,)
        sound = (
            position.stage in STAGES
            and all(type(count) is int and count >= 0 for count in counts)
            and all(type(figure) in (int, float) for figure in metrics)
            and position.global_step == saved.global_step
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{saved.path} does not say where its run stood", hint="its state.json was changed")
    return position
