"""Stage 1, matrix orientation: every mixer's matrix moves towards its teacher's attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.mixers.kinds import matrix_parameters
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent, register_objective, run_trunk
from mohawkify.objectives.trainable import mixers_by_layer, mixing_modules
from mohawkify.ops.dispatch import orient_loss
from mohawkify.ops.scan import MixingMatrix
from mohawkify.recipe.schema import OrientRecipe
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks


@register_objective("matrix")
class MatrixObjective(Objective):
    """Sum over layers of the mean Frobenius distance between mixing and attention matrices.

    One teacher forward without gradients; a hook on each attention module runs and differentiates that layer's mixer
    at once, band by band, so that no matrix ever exists. Scan, gate, output projection and MLP are not computed.

    Args:
        models: teacher and student.
        block: how the matrices' columns are weighted.

    Source: MOHAWK (arXiv 2408.10189), section 4.1; Llamba (arXiv 2502.14458), section 4.1.
    """

    def __init__(self, models: TeacherStudent, block: OrientRecipe) -> None:
        super().__init__(models, block)
        self.weighting = block.weighting

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the mixers' matrices are made of."""
        return matrix_parameters(self.models.student)

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Objective.run`; ``relative`` is the length-free distance |M - P| / |P| averaged over layers."""
        models = self.models
        mixers = mixers_by_layer(models.student, models.spec)
        attentions = mixing_modules(models.teacher, models.spec)
        document_starts_bl = batch.position_ids == 0
        losses, relatives = [], []

        def on_attention(call: LayerCall) -> None:
            assert call.attention is not None
            attention = call.attention.of_heads(models.spec.layer_specs[call.layer].replaced_heads)
            parts = runner.call(mixers[call.layer].matrix_parts, call.hidden_bld, document_starts_bl)
            weights_bhs = attention.column_weights() if self.weighting == "values" else None
            loss, relative = orient_loss(
                MixingMatrix(*parts), attention, document_starts_bl, weights_bhs, models.kernels
            )
            runner.backward(loss)
            losses.append(loss.detach())
            relatives.append(relative)

        with torch.no_grad(), capture_attention(models.teacher, models.adapter), layer_hooks(attentions, on_attention):
            run_trunk(models.teacher, batch, models.spec)
        return {"loss": torch.stack(losses).sum(), "relative": torch.stack(relatives).mean()}
