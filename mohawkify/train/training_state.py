"""How far a run is: the part of a checkpoint's state that changes from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mohawkify.errors import CheckpointError
from mohawkify.run.checkpoint import Checkpoint
from mohawkify.train.plateau import PlateauDetector
from mohawkify.train.watchdog import SpikeDetector


@dataclass
class TrainingState:
    """How far a run is.

    Args:
        stage: the stage under way.
        stage_step: optimizer steps of its plan that are taken or skipped.
        global_step: optimizer steps taken in all.
        tokens: tokens read in all.
        seconds: training time of each stage so far, by name.
        losses: running mean and variance of the stage's loss.
        plateau: the loss of the phase, window by window.
        skipped: planned steps of the stage that phases on a plateau did not take, by text.
        num_idle: steps of the stage in which no prediction counted.
        first_kl: of the stage's first measurement within it, if there was one.
    """

    stage: str = ""
    stage_step: int = 0
    global_step: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    losses: SpikeDetector = field(default_factory=SpikeDetector)
    plateau: PlateauDetector = field(default_factory=PlateauDetector)
    skipped: dict[str, int] = field(default_factory=dict)
    num_idle: int = 0
    first_kl: float | None = None

    def begin(self, stage: str) -> None:
        """Begin a stage."""
        self.stage, self.stage_step, self.skipped, self.num_idle = stage, 0, {}, 0
        self.losses, self.plateau, self.first_kl = SpikeDetector(), PlateauDetector(), None

    def add_step(self, step: int, tokens: int, seconds: float) -> None:
        """Count a step of the stage, of this number from 1."""
        self.stage_step = step
        self.global_step += 1
        self.tokens += tokens
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + seconds

    def skip_to(self, step: int, data: str) -> None:
        """Skip planned steps that read such text."""
        self.skipped[data] = self.skipped.get(data, 0) + step - self.stage_step
        self.stage_step = step


def read_training_state(saved: Checkpoint, stages: Sequence[str]) -> TrainingState:
    """The state in a checkpoint; the folder may be a stranger's, so every value is checked.

    Args:
        saved: the checkpoint.
        stages: the recipe's stages.

    Raises:
        CheckpointError: a value is missing or impossible.
    """
    try:
        values = dict(saved.state["training_state"])
        detectors = {"losses": SpikeDetector(**values["losses"]), "plateau": PlateauDetector(**values["plateau"])}
        state = TrainingState(**{**values, **detectors})
        plateau = state.plateau
        steps = (state.stage_step, state.global_step, state.tokens, state.num_idle)
        counts = (*steps, state.losses.num_losses, plateau.num_losses, *state.skipped.values())
        metrics = (*state.seconds.values(), state.losses.mean, state.losses.variance, plateau.total)
        metrics += tuple(value for value in (plateau.before, state.first_kl) if value is not None)
        is_sound = (
            state.stage in stages
            and all(type(count) is int and count >= 0 for count in counts)
            and all(type(metric) in (int, float) for metric in metrics)
            and state.global_step == saved.global_step
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{saved.path} holds no valid training_state", hint="its state.json was changed")
    return state
