"""The learning rates that range tests found: recorded in the run, and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mohawkify.errors import CheckpointError
from mohawkify.evaluation.line_plot import line_plot
from mohawkify.files import atomic
from mohawkify.planning.rules import RangeRules
from mohawkify.run.folder import RunFolder
from mohawkify.train.conversion import Conversion
from mohawkify.train.loop import Stage
from mohawkify.train.range_test import RangeTest
from mohawkify.train.training_state import TrainingState


def find_rate(
    conversion: Conversion, stage: Stage, state: TrainingState, micro_batch: int, check: Callable[[], None]
) -> float:
    """The learning rate for a stage from its student as it is, found once: a run that continues takes what it recorded.

    Args:
        conversion: the run.
        stage: the stage.
        state: how far the run is.
        micro_batch: sequences per forward pass in one process.
        check: called before every pass; it may raise to stop.

    Raises:
        CheckpointError: the stage is under way and its rate is not recorded, or the record is damaged.
    """
    taken = state.stage_step - sum(state.skipped.values())
    begun_at = state.global_step - taken  # the record of another student is of no use
    found = conversion.world.on_rank0(lambda: recorded_rates(conversion.run).get(stage.name))
    if found is not None and found["after_steps"] == begun_at:
        return float(found["learning_rate"])
    if taken:
        raise CheckpointError(
            f"{conversion.run.tuning_file} lacks the learning rate of stage {stage.name}, which is under way",
            hint="bring the file back, or start anew with another --output",
        )
    conversion.options.report(f"stage {stage.name}: looking for its learning rate")
    found = {"after_steps": begun_at, **RangeTest(conversion, stage, micro_batch, check, RangeRules()).run()}
    conversion.world.on_rank0(lambda: _record(conversion.run, stage.name, found))
    losses = (f"{row['learning_rate']:g}: {row['loss'] or math.inf:.4f}" for row in found["rates"])
    conversion.options.report(
        f"stage {stage.name}: learning rate {found['learning_rate']:g}; loss {found['start_loss']:.4f}, after"
        f" {found['steps']} steps at {', '.join(losses)}"
    )
    return float(found["learning_rate"])


def recorded_rates(run: RunFolder) -> dict[str, dict[str, Any]]:
    """What range tests found, by stage.

    Raises:
        CheckpointError: the file is damaged.
    """
    found = atomic.read_json(run.tuning_file) if run.tuning_file.is_file() else {}
    if not isinstance(found, dict) or not all(_is_sound(each) for each in found.values()):
        raise CheckpointError(
            f"{run.tuning_file} is damaged",
            hint="remove it: learning rates of stages that have not begun are found again",
        )
    return found


def _is_sound(found: Any) -> bool:
    match found:
        case {"learning_rate": float(rate), "after_steps": int(), "start_loss": float(), "rates": list(rows)}:
            return 0 < rate < math.inf and all(isinstance(row, dict) for row in rows)
    return False


def _record(run: RunFolder, stage: str, found: dict[str, Any]) -> None:
    atomic.write_json(run.tuning_file, {**recorded_rates(run), stage: found})
    points = [(row["learning_rate"], row["loss"]) for row in found["rates"] if row["loss"]]
    ends = [points[0][0], points[-1][0]] if points else []
    curves = {
        f"after {found['steps']} steps": points,
        "before": [(rate, found["start_loss"]) for rate in ends],
        "chosen": [(found["learning_rate"], found["start_loss"])],
    }
    atomic.write_text(run.path / f"tuning-{stage}.svg", line_plot("learning rate", "loss", curves))
