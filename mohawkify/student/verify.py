"""Verify an autodetected family on the loaded weights, before training.

Shapes: b batch, h query heads, g key heads, l target position, s source position, p head width, d model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.errors import UnknownFamilyError
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.mixers.mixer import Mixer
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import ResolvedTeacher

DOCUMENTS = (7, 9)  # tokens of the two documents that lie in one row
# Of the largest output; a wrong adapter is off by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def require_true_family(resolved: ResolvedTeacher) -> None:
    """Verify an autodetected family as a conversion by any recipe does; the weights are loaded, on the CPU.

    Raises:
        TeacherError: see `verify_family`.
    """
    recipe, adapter = StudentRecipe(init="attention"), resolved.adapter
    teacher = load_teacher(resolved, dtype=torch.float32, device=torch.device("cpu"))
    spec = design_student(resolved.name, resolved.spec, resolved.config, adapter, recipe)
    student = build_student(teacher, adapter, spec, recipe.start, seed=0)
    verify_family(teacher, student, adapter, resolved.spec.vocab_size)


@torch.no_grad()
def verify_family(teacher: PreTrainedModel, student: PreTrainedModel, adapter: Adapter, vocab_size: int) -> None:
    """Check an autodetected family on one row of two random documents.

    Every attention module is captured, each matrix times the values that the projections give is the module's output,
    no row attends to the future or across the border of documents, and the student's mixers receive borders and
    padding.

    Args:
        teacher: loaded.
        student: grafted from it.
        adapter: the autodetected family.
        vocab_size: token ids are drawn below it.

    Raises:
        UnknownFamilyError: names what is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    ids_bl = torch.randint(vocab_size, (1, sum(DOCUMENTS)), generator=generator).to(teacher.device)
    position_bl = torch.cat([torch.arange(length) for length in DOCUMENTS]).unsqueeze(0).to(teacher.device)
    inputs: dict[str, Any] = {"input_ids": ids_bl, "position_ids": position_bl, "use_cache": False}
    attentions = {i: getattr(layer, adapter.attention) for i, layer in enumerate(find_layers(teacher, adapter.layers))}
    calls: list[LayerCall] = []
    with capture_attention(teacher, adapter), layer_hooks(attentions, calls.append):
        teacher(**inputs)
    if [call.layer for call in calls] != list(attentions):
        raise _mismatch(adapter, "its layers do not run one after the other, each once")
    for call in calls:
        _verify_attention(adapter, call, attentions[call.layer])
    _verify_keywords(adapter, student, inputs)


def _verify_attention(adapter: Adapter, call: LayerCall, attention: nn.Module) -> None:
    if call.attention is None:
        raise _mismatch(adapter, f"the attention of layer {call.layer} was not captured through the interface")
    matrix_bhls = call.attention.probabilities()
    if matrix_bhls.triu(1).any():
        raise _mismatch(adapter, f"layer {call.layer} attends to the future")
    if matrix_bhls[:, :, DOCUMENTS[0] :, : DOCUMENTS[0]].any():
        raise _mismatch(adapter, f"layer {call.layer} attends across the border of two documents")
    expected_bld = _attend(matrix_bhls, call.hidden_bld, adapter, attention)
    error = (expected_bld - call.output_bld.float()).abs().max() / call.output_bld.float().abs().max()
    if not error <= TOLERANCE[call.output_bld.dtype]:
        raise _mismatch(
            adapter,
            f"the attention of layer {call.layer} is not its matrix times its values (they differ by {error:.2g})",
        )


def _attend(matrix_bhls: Tensor, hidden_bld: Tensor, adapter: Adapter, attention: nn.Module) -> Tensor:
    weights = read_attention(adapter, attention)
    v_bgsp = torch.einsum("bsd,gpd->bgsp", hidden_bld.float(), weights.v_gpd.float())
    if weights.v_bias_gp is not None:
        v_bgsp = v_bgsp + weights.v_bias_gp.float().unsqueeze(1)
    v_bhsp = v_bgsp.repeat_interleave(matrix_bhls.shape[1] // v_bgsp.shape[1], dim=1)
    out_bld = torch.einsum("bhlp,dhp->bld", matrix_bhls @ v_bhsp, weights.out_dhp.float())
    return out_bld if weights.out_bias_d is None else out_bld + weights.out_bias_d.float()


def _verify_keywords(adapter: Adapter, student: PreTrainedModel, inputs: dict[str, Any]) -> None:
    received: list[dict[str, Any]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, kwargs: received.append(kwargs), with_kwargs=True)
        for module in student.modules()
        if isinstance(module, Mixer)
    ]
    try:
        student(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    finally:
        for handle in handles:
            handle.remove()
    for name in ("position_ids", "padding_mask"):
        if any(kwargs.get(name) is None for kwargs in received):
            raise _mismatch(adapter, f"its decoder layers keep {name} from their attention")


def _mismatch(adapter: Adapter, reason: str) -> UnknownFamilyError:
    return UnknownFamilyError(
        f"the family {adapter.model_type} has no file in adapters/, and its weights contradict its modules: {reason}",
        hint="docs/adapters.md says how to add a family: one file",
    )
