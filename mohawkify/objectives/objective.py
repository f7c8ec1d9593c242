"""The objective of a stage: its loss, and the parameters that it trains; and the registry of all objectives.

A new objective is one file: a class registered under a name, with the block of the recipe that configures it.
hidden_state.py is the example; docs/architecture.md describes the registration of one outside of the package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.data.packing import Batch, document_mask
from mohawkify.families.adapter import Adapter
from mohawkify.recipe.stages import StageRecipe, register_stage_block
from mohawkify.student.student_spec import StudentSpec

Result = TypeVar("Result")


def _call(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    return function(*args, **kwargs)


@dataclass(frozen=True)
class Runner:
    """Runs and differentiates parts of the student, whose parameters may be spread over processes.

    Args:
        backward: takes a loss and adds its gradients, weighted by the micro-batch's share of the step.
        call: calls a function with arguments; while it runs, the student's parameters are whole.
    """

    backward: Callable[[Tensor], None]
    call: Callable[..., Any] = _call


@dataclass
class TeacherStudent:
    """Teacher and student; `replace_teacher` is the only change.

    Args:
        teacher: the teacher in memory.
        student: the student.
        spec: the student's facts.
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
        """Free the teacher before loading another, because memory does not hold both."""
        del self.teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.teacher, self.teacher_adapter = load(), adapter


class Objective(ABC):
    """The loss of a stage.

    Args:
        models: teacher and student; the teacher is never trained.
        block: the stage's block of the recipe.

    Attributes:
        has_one_backward: whether a micro-batch has a single backward pass, which reaches all trained parameters.
    """

    has_one_backward: ClassVar[bool] = False

    def __init__(self, models: TeacherStudent, block: StageRecipe) -> None:
        self.models, self.block = models, block

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's parameters that the stage trains, by name; the optimizer gets no others."""

    def weight(self, batch: Batch) -> float:
        """The weight of a batch's loss, a mean, beside that of other batches: its number of sequences by default."""
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


OBJECTIVES: dict[str, type[Objective]] = {}  # filled by `register_objective`
Class = TypeVar("Class", bound=type[Objective])


def register_objective(name: str, block: type[StageRecipe] | None = None) -> Callable[[Class], Class]:
    """Register the decorated class as an objective.

    Args:
        name: the value of ``objective`` in a recipe.
        block: the model of the stage's block in the recipe; None where recipe/stages.py has it.
    """
    if block is not None:
        register_stage_block(name, block)

    def register(objective: Class) -> Class:
        OBJECTIVES[name] = objective
        return objective

    return register


def run_trunk(teacher: PreTrainedModel, batch: Batch, spec: StudentSpec) -> None:
    """Run the teacher's full forward pass except for its head, which the layer-wise stages do not need."""
    teacher.base_model(**model_inputs(teacher, batch, spec))


def model_inputs(model: PreTrainedModel, batch: Batch, spec: StudentSpec | Adapter) -> dict[str, Any]:
    """The inputs of a teacher or student, under which no token attends across the borders of documents."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if spec.packs_by_mask:
        mask_b1ll = document_mask(batch.position_ids)
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = model.dtype
            mask_b1ll = torch.zeros_like(mask_b1ll, dtype=dtype).masked_fill(~mask_b1ll, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask_b1ll
    return inputs
