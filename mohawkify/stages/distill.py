"""Stage 3, knowledge distillation: the whole student moves towards the teacher's next-token distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.ops.distill_chunks import distill_loss_chunked
from mohawkify.ops.losses import distill_loss
from mohawkify.recipe import DistillRecipe
from mohawkify.stages.base import Pair, Runner, Stage, model_inputs
from mohawkify.stages.parameters import trainable_parameters
from mohawkify.teacher.head import run_to_head


class Distill(Stage):
    """Mean over the predictions that count of the soft cross-entropy between teacher and student.

    Args:
        pair: teacher and student.
        recipe: temperature and the parts to train; all of them as in Llamba, no MLP as in MOHAWK.

    Source: MOHAWK (arXiv 2408.10189), section 4.3; Llamba (arXiv 2502.14458), section 4.1.
    """

    name = "distill"

    def __init__(self, pair: Pair, recipe: DistillRecipe) -> None:
        super().__init__(pair)
        self.temperature = recipe.temperature
        self.parts = recipe.train

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parts of the whole student."""
        return trainable_parameters(self.pair.student, self.pair.spec, self.parts)

    def weight(self, batch: Batch) -> float:
        """The number of predictions that count."""
        return float(batch.counts.sum())

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Stage.run`; ``kl`` is KL(teacher || student) in nats per token at the stage's temperature."""
        compare = self._compare_heads if self.pair.adapter.logits.unknown is None else self._compare_logits
        loss, kl = compare(batch, runner)
        runner.backward(loss)
        return {"loss": loss.detach(), "kl": kl}

    def _compare_heads(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """The logits of a few tokens at a time."""
        teacher, student, spec = self.pair.teacher, self.pair.student, self.pair.spec
        with torch.no_grad():
            teacher_head = run_to_head(teacher, self.pair.adapter, **model_inputs(teacher, batch, spec))

        def compare() -> tuple[Tensor, Tensor]:
            # The loss is taken in here too: it needs the head's own weight, which is sure to be whole only in here.
            student_head = run_to_head(student, self.pair.adapter, **model_inputs(student, batch, spec))
            return distill_loss_chunked(student_head, teacher_head, batch.counts, self.temperature)

        found: tuple[Tensor, Tensor] = runner.call(compare)
        return found

    def _compare_logits(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """All logits at once, as the models make them."""
        teacher, student, spec = self.pair.teacher, self.pair.student, self.pair.spec
        with torch.no_grad():
            teacher_blv = teacher(**model_inputs(teacher, batch, spec)).logits
        student_blv = runner.call(student, **model_inputs(student, batch, spec)).logits
        return distill_loss(student_blv, teacher_blv, batch.counts, self.temperature)
