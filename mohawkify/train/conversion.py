"""The values that a conversion is made of: its options, and all that its training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.corpus import Corpus
from mohawkify.distributed.process_group import World
from mohawkify.mixers.calibration import Calibration
from mohawkify.objectives.objective import TeacherStudent
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RunFolder
from mohawkify.train.second_teacher import FinalTeacher
from mohawkify.train.tracking import PROJECT

Report = Callable[[str], None]


def ignore(line: str) -> None:
    """Drop a line."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs; the result does not depend on these.

    Args:
        output: the run's folder; None for ``runs/<student name>``.
        resume: ``auto`` continues a run of the same teacher and recipe; ``never`` requires a fresh folder.
        hang_timeout: seconds without progress after which the process ends with exit code 75; 0 for never.
        disk_wait: seconds to retry a checkpoint where the disk is full.
        prepared: folder in which `mohawkify data prepare` wrote tokenised text.
        track: names of the trackers that receive the metrics as well.
        track_project: the project in which trackers show the run.
        report: receives a line for every step of the way.
    """

    output: Path | None = None
    resume: str = "auto"
    hang_timeout: float = 0.0
    disk_wait: float = 0.0
    prepared: Path | None = None
    track: Sequence[str] = ()
    track_project: str = PROJECT
    report: Report = ignore


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to train; every process of a run has one and makes the same calls.

    Only the main process writes to the run's folder.

    Args:
        run: the folder.
        recipe: budgets, batches, precision.
        options: how the conversion runs; nothing is reported outside of the main process.
        identity: a hash of recipe and teacher, which its checkpoints carry.
        models: teacher and student.
        tokenizer: the teacher's.
        corpora: the text of ``train`` and, where a stage ends on other text, of ``final_phase``.
        held_out: rows of text for measurements.
        device: where models and batches are.
        world: the processes of the run.
        final_teacher: the second teacher or its logits, for the final phase; None where there is none.
        load_first: loads the first teacher again, after another has replaced it.
        load_final: loads the second teacher.
        calibrations: of the mixers, by layer, where the start is ``calibrated``.
    """

    run: RunFolder
    recipe: Recipe
    options: ConvertOptions
    identity: str
    models: TeacherStudent
    tokenizer: PreTrainedTokenizerBase
    corpora: dict[str, Corpus]
    held_out: list[np.ndarray]
    device: torch.device
    world: World
    final_teacher: FinalTeacher | None
    load_first: Callable[[], PreTrainedModel]
    load_final: Callable[[], PreTrainedModel]
    calibrations: dict[int, Calibration] = field(default_factory=dict)
