"""A student that training goes on with: the weights of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mohawkify.errors import RecipeError
from mohawkify.run.folder import finished_run
from mohawkify.student.save import load_student


@torch.no_grad()
def begin_with(student: PreTrainedModel, run: str) -> None:
    """Give a student the weights of a finished run's; they must be of one kind and size.

    Args:
        student: as the recipe makes it.
        run: the folder of the run.

    Raises:
        UsageError: there is no such run, or it is not finished.
        CheckpointError: its student is damaged.
        RecipeError: its student is another one.
    """
    model: Any = student
    found: Any = load_student(finished_run(Path(run)).checked_final())
    # As JSON, in which one of them was.
    mixers = [json.loads(json.dumps(each.config.mixer)) for each in (found, model)]
    own, begin = student.state_dict(), found.state_dict()
    wrong = [f"mixer.{key}" for key in mixers[0].keys() | mixers[1].keys() if mixers[0].get(key) != mixers[1].get(key)]
    wrong += [name for name in own.keys() | begin.keys() if _shape(own.get(name)) != _shape(begin.get(name))]
    if wrong:
        first = sorted(wrong)[0]
        raise RecipeError(
            f"student.begin: the student of {run} is another one than the recipe's: {first} differs",
            hint=f"take over the keys of student from {run}/recipe.yaml, but init",
        )
    for name, tensor in own.items():
        tensor.copy_(begin[name])


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
