"""Stage 2, hidden-state alignment: every student layer, given the teacher's input, learns the teacher's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.families.decoder_layers import find_layers
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent, register_objective, run_trunk
from mohawkify.objectives.trainable import layer_parameters, mixing_modules
from mohawkify.ops.losses import align_loss
from mohawkify.recipe.schema import AlignRecipe
from mohawkify.teacher.capture import LayerCall, layer_hooks


@register_objective("hidden_state")
class HiddenStateObjective(Objective):
    """Sum over layers of the mean distance between student and teacher vectors.

    The target is the whole block's output (Llamba) or the mixer's alone (Phi-Mamba), taken by a hook from the
    teacher's own forward pass: ``hidden_states[-1]`` would be after the final norm. Layers do not depend on each
    other; each is run and differentiated inside the hook.

    Args:
        models: teacher and student.
        block: the target and the parts to train.

    Source: MOHAWK (arXiv 2408.10189), section 4.2; Llamba (arXiv 2502.14458), section 4.1.
    """

    def __init__(self, models: TeacherStudent, block: AlignRecipe) -> None:
        super().__init__(models, block)
        self.target = block.target
        self.parts = block.train if block.target == "block" else ("mixer",)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parts of the grafted layers; with the mixer as target, the mixers alone."""
        return layer_parameters(self.models.student, self.models.spec, self.parts)

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Objective.run`; ``relative`` is the distance over the teacher's norm, a mean over tokens and layers."""
        teachers, students = self._modules(self.models.teacher), self._modules(self.models.student)
        losses, relatives = [], []

        def on_layer(call: LayerCall) -> None:
            output = runner.call(students[call.layer], call.hidden_bld, *call.further, **call.arguments)
            output_bld = output[0] if isinstance(output, tuple) else output
            loss, relative = align_loss(output_bld, call.output_bld)
            runner.backward(loss)
            losses.append(loss.detach())
            relatives.append(relative)

        with torch.no_grad(), layer_hooks(teachers, on_layer):
            run_trunk(self.models.teacher, batch, self.models.spec)
        return {"loss": torch.stack(losses).sum(), "relative": torch.stack(relatives).mean()}

    def _modules(self, model: nn.Module) -> dict[int, nn.Module]:
        spec = self.models.spec
        if self.target == "mixer":
            return mixing_modules(model, spec)
        layers = find_layers(model, spec.layers)
        return {index: layers[index] for index in spec.mixer_layers}
