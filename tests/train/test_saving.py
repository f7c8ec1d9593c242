"""A whole checkpoint whose tensors are not the student's: one clear error before any is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mohawkify.errors import CheckpointError
from mohawkify.run.checkpoint import StoredTensors
from mohawkify.train.saving import require_fitting

STUDENT = nn.Linear(3, 2)
KINDS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, Tensor]


def stored(folder: Path, change: Callable[[Tensors, Tensors], object]) -> tuple[StoredTensors, StoredTensors]:
    model = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    state = {f"{kind}/weight": torch.zeros(2, 3) for kind in KINDS} | {"step/weight": torch.tensor(3.0)}
    change(model, state)
    save_file(model, folder / "model.safetensors")
    save_file(state, folder / "optimizer.safetensors")
    return StoredTensors(folder / "model.safetensors"), StoredTensors(folder / "optimizer.safetensors")


def test_what_a_student_left_is_taken(tmp_path: Path) -> None:
    require_fitting(tmp_path, STUDENT, *stored(tmp_path, lambda model, state: None))
    require_fitting(tmp_path, STUDENT, *stored(tmp_path, lambda model, state: state.clear()))


CASES: dict[str, tuple[Callable[[Tensors, Tensors], object], str]] = {
    "a missing tensor": (lambda model, state: model.pop("bias"), "are not those of this student"),
    "one more": (lambda model, state: model.update(x=torch.ones(1)), "are not those of this student"),
    "another shape": (lambda model, state: model.update(weight=torch.ones(3, 2)), r"weight .* shape \(3, 2\) of F32"),
    "one that would spread": (lambda model, state: model.update(weight=torch.ones(1, 3)), r"expected \(2, 3\) of F32"),
    "whole numbers": (lambda model, state: model.update(bias=torch.ones(2, dtype=torch.int64)), "I64"),
    "a missing moment": (lambda model, state: state.pop("exp_avg_sq/weight"), "lacks exp_avg_sq/weight"),
    "a missing counter": (lambda model, state: state.pop("step/weight"), "lacks step/weight"),
    "a moment of another kind": (lambda model, state: state.update({"x/weight": torch.ones(1)}), "an odd x/weight"),
    "a misshapen moment": (lambda model, state: state.update({"exp_avg/weight": torch.ones(6)}), "exp_avg/weight"),
    "a misshapen counter": (lambda model, state: state.update({"step/weight": torch.ones(2)}), "step/weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_the_students_is_refused(tmp_path: Path, name: str) -> None:
    change, says = CASES[name]
    tensors = stored(tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        require_fitting(tmp_path, STUDENT, *tensors)
