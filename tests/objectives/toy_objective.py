"""An objective from outside of the package, in one file: the final norms of the student learn the teacher's logits."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.objectives.objective import Objective, Runner, model_inputs, register_objective
from mohawkify.recipe.stages import StageRecipe
from mohawkify.recipe.types import ListOf


class ToyRecipe(StageRecipe):
    """A stage that trains norms."""

    objective: Literal["toy"] = Field(default="toy", description="loss: mean square of the logits' difference")
    train: ListOf[Literal["norm"]] = Field(default=("norm",), description="parts of the student that learn")
    scale: float = Field(default=1.0, gt=0, description="factor of the loss")


@register_objective("toy", ToyRecipe)
class ToyObjective(Objective):
    """Mean square of the difference between the logits of student and teacher."""

    has_one_backward = True

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.models.student.named_parameters() if "norm" in name}

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        models = self.models
        with torch.no_grad():
            teacher = models.teacher(**model_inputs(models.teacher, batch, models.adapter)).logits
        student = runner.call(models.student, **model_inputs(models.student, batch, models.spec)).logits
        loss = self.block.scale * (student - teacher).square().mean()  # type: ignore[attr-defined]
        runner.backward(loss)
        return {"loss": loss.detach()}
