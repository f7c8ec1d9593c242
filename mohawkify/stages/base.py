"""What a stage is: the parameters it trains, and one micro-batch of forward and backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.adapter import Adapter
from mohawkify.data.packing import Batch, document_mask
from mohawkify.spec import StudentSpec

# Takes a loss and adds its gradients; the engine's.
Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Pair:
    """The teacher, the student, the student's facts and their family."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    spec: StudentSpec
    adapter: Adapter


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

    @abstractmethod
    def run(self, batch: Batch, backward: Backward) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch.

        Args:
            batch: packed tokens.
            backward: called once or several times with losses whose sum is this micro-batch's loss.

        Returns:
            ``loss`` and further figures, detached scalars averaged over the micro-batch.
        """


def run_trunk(teacher: PreTrainedModel, batch: Batch, spec: StudentSpec) -> None:
    """Run the teacher's full forward pass except for its head, which the layer-wise stages do not need."""
    teacher.base_model(**model_inputs(teacher, batch, spec))


def model_inputs(model: PreTrainedModel, batch: Batch, spec: StudentSpec) -> dict[str, Any]:
    """What a teacher or student is called with, so that nothing looks across the borders of documents."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if spec.packs_by_mask:
        mask_b1ll = document_mask(batch.position_ids)
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = model.dtype
            mask_b1ll = torch.zeros_like(mask_b1ll, dtype=dtype).masked_fill(~mask_b1ll, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask_b1ll
    return inputs
