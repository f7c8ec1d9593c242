"""What every teacher must pass before anything is made of it: one list, for conversions and for `doctor` alike."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import ResolvedTeacher


def require_whole(teacher: ResolvedTeacher) -> None:
    """Refuse tensors that are not exactly the model's, and wrong generation settings; no weights are read.

    Raises:
        TeacherError: see `load_teacher`.
    """
    load_teacher(teacher, dtype=torch.float32, device=torch.device("meta"))


# Beside `resolve_teacher`, which refuses a wrong configuration; the weights' values are judged when they are loaded.
CHECKS: dict[str, Callable[[ResolvedTeacher], object]] = {
    "shards, index and headers agree": lambda teacher: teacher.tensors,
    "tokenizer": lambda teacher: teacher.tokenizer,
    "tensors are the model's": require_whole,
}


def require_sound(teacher: ResolvedTeacher) -> None:
    """Refuse a teacher that fails one of `CHECKS`; its files must be here.

    Raises:
        TeacherError: the first that fails.
        CheckpointError: a file that is not strict JSON.
    """
    for check in CHECKS.values():
        check(teacher)
