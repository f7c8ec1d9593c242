"""Measure a finished run again: on its own held-out text, and on the tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mohawkify import storage
from mohawkify.data.corpus import build_corpus, hold_out
from mohawkify.data.evaluation import evaluation_batches, evaluation_rows
from mohawkify.errors import TeacherError
from mohawkify.evaluate.agreement import measure_agreement, measure_teacher
from mohawkify.recipe import Recipe, StagesRecipe
from mohawkify.run import RunFolder
from mohawkify.student.save import load_student
from mohawkify.teacher.load import load_teacher, load_tokenizer, teacher_hashes
from mohawkify.teacher.locate import find_folder

Report = Callable[[str], None]
EVAL_JSON, EVAL_MARKDOWN = "eval.json", "eval.md"


def teacher_folder(run: RunFolder, override: str | None = None) -> Path:
    """The folder of a run's teacher, proved to hold the very files the run was made from.

    Args:
        run: the run.
        override: where the teacher is now; None looks where it was.

    Raises:
        TeacherError: it is not there, or its files have changed.
    """
    facts = storage.read_json(run.teacher_file)
    recorded = Path(facts["folder"])
    folder = recorded if override is None and recorded.is_dir() else find_folder(override or facts["source"])
    found = teacher_hashes(folder)
    changed = sorted(name for name in facts["files"].keys() | found.keys() if facts["files"].get(name) != found.get(name))
    if changed:
        raise TeacherError(
            f"{folder} is not the teacher that {run.path} was made from: {changed[0]} differs",
            hint="name the folder of the original teacher with --teacher",
        )
    return folder


def load_run_teacher(run: RunFolder, folder: Path, device: torch.device) -> Any:
    """Load a run's teacher in the precision in which it taught."""
    is_bf16 = run.recipe().compute.precision == "bf16"
    return load_teacher(folder, dtype=torch.bfloat16 if is_bf16 else torch.float32, device=device)


def held_out_rows(
    run: RunFolder, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, vocabulary_size: int
) -> list[np.ndarray]:
    """The rows of held-out text that the run was measured on; the corpora in the run are used again."""
    held = recipe.evaluation.tokens
    corpora: dict[str, Any] = {
        "directory": run.corpora,
        "teacher_directory": folder,
        "vocab_size": vocabulary_size,
    }
    if recipe.data.validation:
        corpus = build_corpus(recipe.data.validation, tokenizer, num_tokens=held, **corpora)
    else:
        wanted = _training_tokens(recipe) + held
        _, corpus = hold_out(build_corpus(recipe.data.train, tokenizer, num_tokens=wanted, **corpora), held)
    return evaluation_rows(corpus, sequence_length=recipe.evaluation.sequence_length, num_tokens=held)


def _training_tokens(recipe: Recipe) -> int:
    """How many tokens of ``data.train`` all stages read."""
    total = 0
    for name in StagesRecipe.model_fields:
        stage = getattr(recipe.stages, name)
        for segment in stage.segments():
            if segment.data == "train":
                total += segment.num_steps * segment.sequence_length * stage.batch_sequences
    return total
