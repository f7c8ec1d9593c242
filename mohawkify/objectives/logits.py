"""Stage 3, knowledge distillation: the whole student moves towards the teacher's next-token distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent, model_inputs, register_objective
from mohawkify.objectives.trainable import trainable_parameters
from mohawkify.ops.chunked_kl import LMHeadInput, chunked_distill_loss
from mohawkify.ops.losses import TopK, distill_loss, distill_loss_top_k
from mohawkify.recipe.schema import DistillRecipe
from mohawkify.teacher.lm_head import run_to_lm_head


@register_objective("logits")
class LogitsObjective(Objective):
    """Mean over the predictions that count of the soft cross-entropy between teacher and student.

    Another teacher of the same vocabulary may replace the first (`TeacherStudent.replace_teacher`), and so may cached
    logits (`read_logits`). Where the embeddings differ in length, the rows that both have are compared.

    Args:
        models: teacher and student.
        block: temperature and the parts to train; all of them as in Llamba, no MLP as in MOHAWK.

    Source: MOHAWK (arXiv 2408.10189), section 4.3; Llamba (arXiv 2502.14458), section 4.1.
    """

    has_one_backward = True

    def __init__(self, models: TeacherStudent, block: DistillRecipe) -> None:
        super().__init__(models, block)
        self.temperature = block.temperature
        self.parts = block.train
        self._logits: TeacherLogits | None = None

    def read_logits(self, logits: TeacherLogits | None) -> None:
        """Learn from these cached logits from here on, or with None from the teacher in memory."""
        self._logits = logits

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parts of the whole student."""
        return trainable_parameters(self.models.student, self.models.spec, self.parts)

    def weight(self, batch: Batch) -> float:
        """The number of predictions that count."""
        return float(batch.loss_mask.sum())

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Objective.run`; ``kl`` is KL(teacher || student) in nats per token at the stage's temperature."""
        families = [self.models.adapter] if self._logits else [self.models.adapter, self.models.teacher_adapter]
        knows_heads = all(family.logits.unknown is None for family in families)
        compare = self._compare_heads if knows_heads else self._compare_logits
        loss, kl = compare(batch, runner)
        runner.backward(loss)
        return {"loss": loss.detach(), "kl": kl}

    def _compare_heads(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """The logits of a few tokens at a time."""
        models, family = self.models, self.models.teacher_adapter
        teacher: LMHeadInput | TopK
        if self._logits is not None:
            teacher, num_rows = self._cached(batch, self._logits)
        else:
            with torch.no_grad():
                teacher = run_to_lm_head(models.teacher, family, **model_inputs(models.teacher, batch, family))
            num_rows = len(teacher.weight_vd)

        def compare() -> tuple[Tensor, Tensor]:
            # The loss is computed in here too: only in here a sharding engine has gathered the head's weight.
            student = run_to_lm_head(models.student, models.adapter, **model_inputs(models.student, batch, models.spec))
            shared = min(num_rows, len(student.weight_vd))
            known = _first_rows(teacher, shared) if isinstance(teacher, LMHeadInput) else teacher
            return chunked_distill_loss(_first_rows(student, shared), known, batch.loss_mask, self.temperature)

        loss_and_kl: tuple[Tensor, Tensor] = runner.call(compare)
        return loss_and_kl

    def _compare_logits(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """All logits at once, as the models make them."""
        models = self.models
        student_blv = runner.call(models.student, **model_inputs(models.student, batch, models.spec)).logits
        if self._logits is not None:
            cached, num_rows = self._cached(batch, self._logits)
            return distill_loss_top_k(student_blv[..., :num_rows], cached, batch.loss_mask)
        with torch.no_grad():
            teacher_blv = models.teacher(**model_inputs(models.teacher, batch, models.teacher_adapter)).logits
        shared = min(teacher_blv.shape[-1], student_blv.shape[-1])
        return distill_loss(student_blv[..., :shared], teacher_blv[..., :shared], batch.loss_mask, self.temperature)

    @staticmethod
    def _cached(batch: Batch, logits: TeacherLogits) -> tuple[TopK, int]:
        """A teacher's cached answers to a batch, and the number of rows of its embedding that they cover."""
        cached = logits.read(batch.sequences.cpu().numpy())
        return TopK(*(tensor.to(batch.input_ids.device) for tensor in cached)), logits.layout.vocab_size


def _first_rows(head: LMHeadInput, num_rows: int) -> LMHeadInput:
    if len(head.weight_vd) == num_rows:
        return head
    bias_v = None if head.bias_v is None else head.bias_v[:num_rows]
    return head._replace(weight_vd=head.weight_vd[:num_rows], bias_v=bias_v)
