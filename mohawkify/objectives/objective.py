"""What a stage is: the parameters it trains, and one micro-batch of forward and backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.data.packing import Batch, document_mask
from mohawkify.families.adapter import Adapter
from mohawkify.student.student_spec import StudentSpec

Result = TypeVar("Result")


def _call(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    return function(*args, **kwargs)


@dataclass(frozen=True)
class Runner:
    """How a stage runs and differentiates parts of the student, whose parameters may be spread over processes.

    Args:
        backward: takes a loss and adds its gradients, weighted by the micro-batch's share of the step.
        call: calls a function with arguments; while it runs, the student's parameters are whole.
    """

    backward: Callable[[Tensor], None]
    call: Callable[..., Any] = _call


@dataclass
class Pair:
    """The teacher, the student, the student's facts and their family; another teacher may take the first one's place.

    Args:
        teacher: the one in memory.
        student: the student.
        spec: its facts.
        adapter: the family of the student and of the first teacher.
        kernels: the recipe's ``compute.kernels``.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    spec: StudentSpec
    adapter: Adapter
    kernels: str = "auto"
    teacher_adapter: Adapter = field(init=False)

    def __post_init__(self) -> None:
        self.teacher_adapter = self.adapter

    def replace_teacher(self, load: Callable[[], PreTrainedModel], adapter: Adapter) -> None:
        """Let go of the teacher, and only then take another: there is not the memory for both."""
        del self.teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.teacher, self.teacher_adapter = load(), adapter


class Stage(ABC):
    """One stage of MOHAWK.

    Args:
        pair: teacher and student; the teacher is never trained.
    """

    name: str

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's parameters this stage trains, by name; the optimiser sees no others."""

    def weight(self, batch: Batch) -> float:
        """What a batch's loss, a mean, counts for beside that of other batches: its sequences, in most stages."""
        return float(len(batch.input_ids))

    @abstractmethod
    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch.

        Args:
            batch: packed tokens.
            runner: calls every part of the student that learns; its ``backward`` is given, once or several times,
                losses whose sum is this micro-batch's loss.

        Returns:
            ``loss`` and further metrics, detached scalars averaged over the micro-batch.
        """


def run_trunk(teacher: PreTrainedModel, batch: Batch, spec: StudentSpec) -> None:
    """Run the teacher's full forward pass except for its head, which the layer-wise stages do not need."""
    teacher.base_model(**model_inputs(teacher, batch, spec))


def model_inputs(model: PreTrainedModel, batch: Batch, spec: StudentSpec | Adapter) -> dict[str, Any]:
    """What a teacher or student is called with, so that nothing looks across the borders of documents."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if spec.packs_by_mask:
        mask_b1ll = document_mask(batch.position_ids)
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = model.dtype
            mask_b1ll = torch.zeros_like(mask_b1ll, dtype=dtype).masked_fill(~mask_b1ll, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask_b1ll
    return inputs
