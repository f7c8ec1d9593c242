"""Stage 2, hidden-state alignment: every student layer, given the teacher's input, learns the teacher's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohawkify.data.packing import Batch
from mohawkify.families.decoder_layers import find_layers
from mohawkify.objectives.objective import Pair, Runner, Stage, run_trunk
from mohawkify.objectives.trainable import layer_parameters, mixers_by_layer
from mohawkify.ops.losses import align_loss
from mohawkify.recipe.schema import AlignRecipe
from mohawkify.teacher.capture import LayerCall, layer_hooks


class Align(Stage):
    """Sum over layers of the mean distance between student and teacher vectors.

    The target is the whole block's output (Llamba) or the mixer's alone (Phi-Mamba), taken by a hook from the
    teacher's own forward pass: ``hidden_states[-1]`` would be after the final norm. Layers do not depend on each
    other; each is run and differentiated inside the hook.

    Args:
        pair: teacher and student.
        recipe: the target and the parts to train.

    Source: MOHAWK (arXiv 2408.10189), section 4.2; Llamba (arXiv 2502.14458), section 4.1.
    """

    name = "align"

    def __init__(self, pair: Pair, recipe: AlignRecipe) -> None:
        super().__init__(pair)
        self.target = recipe.target
        self.parts = recipe.train if recipe.target == "block" else ("mixer",)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parts of the grafted layers; with the mixer as target, the mixers alone."""
        return layer_parameters(self.pair.student, self.pair.spec, self.parts)

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        """See `Stage.run`; ``relative`` is the distance over the teacher's norm, averaged over tokens and layers."""
        teachers, students = self._modules(self.pair.teacher), self._modules(self.pair.student)
        losses, relatives = [], []

        def on_layer(call: LayerCall) -> None:
            output = runner.call(students[call.layer], call.hidden_bld, *call.further, **call.arguments)
            output_bld = output[0] if isinstance(output, tuple) else output
            loss, relative = align_loss(output_bld, call.output_bld)
            runner.backward(loss)
            losses.append(loss.detach())
            relatives.append(relative)

        with torch.no_grad(), layer_hooks(teachers, on_layer):
            run_trunk(self.pair.teacher, batch, self.pair.spec)
        return {"loss": torch.stack(losses).sum(), "relative": torch.stack(relatives).mean()}

    def _modules(self, model: nn.Module) -> dict[int, nn.Module]:
        spec = self.pair.spec
        if self.target == "mixer":
            return mixers_by_layer(model, spec)
        layers = find_layers(model, spec.layers)
        return {index: layers[index] for index in spec.grafted_layers}
