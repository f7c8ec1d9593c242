"""Stage 3, knowledge distillation: the whole student moves towards the teacher's next-token distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.objectives.objective import Pair, Runner, Stage, model_inputs
from mohawkify.objectives.trainable import trainable_parameters
from mohawkify.ops.chunked_kl import LMHeadInput, chunked_distill_loss
from mohawkify.ops.losses import TopK, distill_loss, distill_loss_top_k
from mohawkify.recipe.schema import DistillRecipe
from mohawkify.teacher.lm_head import run_to_lm_head


class Distill(Stage):
    """Mean over the predictions that count of the soft cross-entropy between teacher and student.

    Another teacher of the same vocabulary may take the place of the first (`Pair.replace_teacher`), and so may kept
    logits of one. Where the embeddings differ in length, the rows that both have are compared.

    Args:
        pair: teacher and student.
        recipe: temperature and the parts to train; all of them as in Llamba, no MLP as in MOHAWK.

    Attributes:
        logits: what teaches instead of the pair's teacher; None where that one does.

    Source: MOHAWK (arXiv 2408.10189), section 4.3; Llamba (arXiv 2502.14458), section 4.1.
    """

    name = "distill"

    def __init__(self, pair: Pair, recipe: DistillRecipe) -> None:
        super().__init__(pair)
        self.temperature = recipe.temperature
        self.parts = recipe.train
        self.logits: TeacherLogits | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parts of the whole student."""
        return trainable_parameters(self.pair.student, self.pair.spec, self.parts)

    def weight(self, batch: Batch) -> float:
        """The number of predictions that count."""
        return float(batch.loss_mask.sum())

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Stage.run`; ``kl`` is KL(teacher || student) in nats per token at the stage's temperature."""
        families = [self.pair.adapter] if self.logits else [self.pair.adapter, self.pair.teacher_adapter]
        knows_heads = all(family.logits.unknown is None for family in families)
        compare = self._compare_heads if knows_heads else self._compare_logits
        loss, kl = compare(batch, runner)
        runner.backward(loss)
        return {"loss": loss.detach(), "kl": kl}

    def _compare_heads(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """The logits of a few tokens at a time."""
        pair, family = self.pair, self.pair.teacher_adapter
        teacher: LMHeadInput | TopK
        if self.logits is not None:
            teacher, num_rows = self._kept(batch, self.logits)
        else:
            with torch.no_grad():
                teacher = run_to_lm_head(pair.teacher, family, **model_inputs(pair.teacher, batch, family))
            num_rows = len(teacher.weight_vd)

        def compare() -> tuple[Tensor, Tensor]:
            # The loss is taken in here too: it needs the head's own weight, which is sure to be whole only in here.
            student = run_to_lm_head(pair.student, pair.adapter, **model_inputs(pair.student, batch, pair.spec))
            shared = min(num_rows, len(student.weight_vd))
            known = _first_rows(teacher, shared) if isinstance(teacher, LMHeadInput) else teacher
            return chunked_distill_loss(_first_rows(student, shared), known, batch.loss_mask, self.temperature)

        found: tuple[Tensor, Tensor] = runner.call(compare)
        return found

    def _compare_logits(self, batch: Batch, runner: Runner) -> tuple[Tensor, Tensor]:
        """All logits at once, as the models make them."""
        pair = self.pair
        student_blv = runner.call(pair.student, **model_inputs(pair.student, batch, pair.spec)).logits
        if self.logits is not None:
            kept, num_rows = self._kept(batch, self.logits)
            return distill_loss_top_k(student_blv[..., :num_rows], kept, batch.loss_mask)
        with torch.no_grad():
            teacher_blv = pair.teacher(**model_inputs(pair.teacher, batch, pair.teacher_adapter)).logits
        shared = min(teacher_blv.shape[-1], student_blv.shape[-1])
        return distill_loss(student_blv[..., :shared], teacher_blv[..., :shared], batch.loss_mask, self.temperature)

    @staticmethod
    def _kept(batch: Batch, logits: TeacherLogits) -> tuple[TopK, int]:
        """What a teacher said after the tokens of a batch, and over how many rows of its embedding."""
        kept = logits.read(batch.sequences.cpu().numpy())
        return TopK(*(tensor.to(batch.input_ids.device) for tensor in kept)), logits.layout.vocab_size


def _first_rows(head: LMHeadInput, num_rows: int) -> LMHeadInput:
    if len(head.weight_vd) == num_rows:
        return head
    bias_v = None if head.bias_v is None else head.bias_v[:num_rows]
    return head._replace(weight_vd=head.weight_vd[:num_rows], bias_v=bias_v)
