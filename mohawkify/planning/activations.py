"""How much memory one layer takes on its way through each stage: the stages' own code, run on tensors without numbers.

Such tensors have shapes and types but no memory, so a layer of any size is counted in a second, with the family's own
code, and what is counted follows that code when it changes.

Shapes: b batch, l length.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig, PreTrainedModel

from mohawkify.data.packing import Batch
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import attention_implementation, find_layers
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.objective import Runner, TeacherStudent, model_inputs, run_trunk
from mohawkify.objectives.trainable import mixers_by_layer, mixing_modules
from mohawkify.ops import scan
from mohawkify.ops.constants import scan_chunk_length, scan_group_tokens
from mohawkify.planning.memory import Footprint
from mohawkify.planning.shapes import Shapes
from mohawkify.recipe.schema import Recipe
from mohawkify.student.build import classes_for, student_config
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks


class _ShortScan(torch.autograd.Function):
    """`scan_chunked` on tensors without numbers, computed on three groups of chunks at most, with the memory of all.

    All whole groups need the same memory on their way, so two of them stand for all (the second starts while the first
    one's tensors are alive), beside an incomplete last one. What the others would leave is allocated in one piece.
    """

    @staticmethod
    def forward(ctx: Any, shapes: Shapes, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, state_bhpn, document_starts_bl = inputs
        x_blhp, b_blhn = tensors[:2]
        batch, length, heads, head_dim = x_blhp.shape
        ctx.chunk_length = scan_chunk_length(head_dim, b_blhn.shape[-1], length)
        group = scan_group_tokens(batch, heads, ctx.chunk_length)
        ctx.short, ctx.shapes = min(length, 2 * group + length % group), shapes
        skipped_y = _empty_rest(x_blhp, ctx.short)
        num_chunks = (length - ctx.short) // ctx.chunk_length
        skipped_states = state_bhpn.new_empty(batch, heads, num_chunks, *state_bhpn.shape[2:])
        states: list[Tensor] = []
        short_y, state_bhpn = scan._scan_groups(  # type: ignore[call-arg]
            *(tensor[:, : ctx.short] for tensor in tensors),
            state_bhpn,
            None if document_starts_bl is None else document_starts_bl[:, : ctx.short],
            ctx.chunk_length,
            states,
        )
        ctx.save_for_backward(*tensors, document_starts_bl, skipped_states, *states)
        with shapes.keeping_peak():
            y_blhp = torch.empty(x_blhp.shape, dtype=x_blhp.dtype)
            del skipped_y, short_y
        return y_blhp, state_bhpn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, document_starts_bl, _ = ctx.saved_tensors[:6]
        skipped = [_empty_rest(tensor, ctx.short) for tensor in tensors]
        with torch.autocast("cpu", enabled=False):
            *short, d_state_bhpn = scan._gradients_of_groups(  # type: ignore[call-arg]
                *(tensor[:, : ctx.short] for tensor in tensors),
                None if document_starts_bl is None else document_starts_bl[:, : ctx.short],
                ctx.chunk_length,
                ctx.saved_tensors[6:],
                gradients[0][:, : ctx.short],
                gradients[1],
            )
        with ctx.shapes.keeping_peak():
            whole = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
            del skipped, short
        return None, *whole, d_state_bhpn, None


def _empty_rest(tensor_bl: Tensor, begin: int) -> Tensor:
    return torch.empty(tensor_bl[:, begin:].shape, dtype=tensor_bl.dtype)


def _short_scan(shapes: Shapes) -> Callable[..., tuple[Tensor, Tensor]]:
    def short_scan(
        x_blhp: Tensor,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        state_bhpn: Tensor | None = None,
        document_starts_bl: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (x_blhp, b_blhn, c_blhn, log_decay_blh)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            return scan.scan_chunked(*inputs, state_bhpn, document_starts_bl)
        state = scan._first_state(x_blhp.to(torch.promote_types(x_blhp.dtype, torch.float32)), b_blhn, state_bhpn)
        with torch.autocast("cpu", enabled=False):
            y_blhp, state = _ShortScan.apply(shapes, *inputs, state, document_starts_bl)
        return y_blhp, state

    return short_scan


def count_footprint(
    config: PretrainedConfig, adapter: Adapter, student: StudentSpec, recipe: Recipe, *, whole_scan: bool = False
) -> Footprint:
    """Count what one sequence takes in one layer, in every stage.

    Args:
        student: the student's facts; its layer with the widest mixer stands for all.
        recipe: precision, lengths and what is trained.
        whole_scan: whether to run all groups of a scan's chunks, which takes far longer; the bytes are equal.

    Returns:
        Bytes per sequence of each stage's greatest length.

    Raises:
        RuntimeError: the family's code reads values of tensors, as routers of experts do.
    """
    lengths = {}
    for name in ("orient", "align", "distill"):
        stage = getattr(recipe.stages, name)
        lengths[name] = max([segment.sequence_length for segment in stage.segments()] or [stage.sequence_length])
    is_half = recipe.compute.precision == "bf16"
    pair = _one_layer(config, adapter, student, torch.bfloat16 if is_half else torch.float32)
    with Shapes() as shapes:
        _without_numbers(pair.teacher)
        _without_numbers(pair.student)
        pair.teacher.requires_grad_(False)
        align = HiddenStateObjective(pair, recipe.stages.align)
        trained = align.parameters()

        if not whole_scan:
            for mixer in mixers_by_layer(pair.student, pair.spec).values():
                mixer.scan = _short_scan(shapes)

        def count(function: Callable[[Batch], dict[str, float]], length: int) -> dict[str, float]:
            return _per_sequence(lambda batch: _watched(pair, function, batch, shapes, is_half), length)

        # The gradient of an embedding would hide everything else: it is the loss's to count, as the head's is.
        tables = {id(p) for m in pair.student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        _learn(pair.student, lambda name, parameter: id(parameter) not in tables)
        pair.student.enable_input_require_grads()
        orient = count(lambda batch: _orient(pair, batch, shapes), lengths["orient"])
        distill = count(lambda batch: _distill(pair, batch, shapes), lengths["distill"])
        _learn(pair.student, lambda name, _: name in trained)
        aligned = count(lambda batch: _align(align, batch, shapes), lengths["align"])
    return Footprint(
        parts=orient["parts"],
        orient=orient["peak"],
        align=aligned["peak"],
        entering=distill["entering"],
        ends=distill["ends"],
        kept=distill["kept"],
        passing=distill["passing"],
        teacher=distill["teacher"],
        counted=True,
    )


def _per_sequence(run: Callable[[Batch], dict[str, float]], length: int) -> dict[str, float]:
    """The memory of one more sequence, without parts that do not depend on the batch, such as weights in bf16."""
    one, two = (run(_batch(num_sequences, length)) for num_sequences in (1, 2))
    return {key: two[key] - one[key] for key in one}


def _watched(
    pair: TeacherStudent,
    function: Callable[[Batch], dict[str, float]],
    batch: Batch,
    shapes: Shapes,
    is_half: bool,
) -> dict[str, float]:
    """Run a function and count the memory in use beside the models, their gradients and the batch."""
    there = [tensor for model in (pair.teacher, pair.student) for tensor in (*model.parameters(), *model.buffers())]
    there += [parameter.grad for parameter in pair.student.parameters() if parameter.grad is not None]
    shapes.start([*there, *batch])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
        return function(batch)


def _batch(num_sequences: int, length: int) -> Batch:
    ids_bl = torch.zeros(num_sequences, length, dtype=torch.long)
    return Batch(ids_bl, torch.arange(length).expand(num_sequences, -1), torch.ones_like(ids_bl, dtype=torch.bool))


def _orient(pair: TeacherStudent, batch: Batch, shapes: Shapes) -> dict[str, float]:
    """Stage 1 without the bands of its matrices, which `memory` adds: a layer's B, C and decay, and back."""
    mixers = mixers_by_layer(pair.student, pair.spec)
    found: dict[str, float] = {}

    def on_attention(call: LayerCall) -> None:
        parts = mixers[call.layer].matrix_parts(call.hidden_bld, batch.position_ids == 0) or ()
        found["parts"] = shapes.bytes
        made = [part for part in parts if part.grad_fn is not None]
        torch.autograd.backward(made, [torch.zeros_like(part) for part in made])

    attentions = mixing_modules(pair.teacher, pair.spec)
    with torch.no_grad(), capture_attention(pair.teacher, pair.adapter), layer_hooks(attentions, on_attention):
        run_trunk(pair.teacher, batch, pair.spec)
    return {**found, "peak": shapes.peak}


def _align(stage: HiddenStateObjective, batch: Batch, shapes: Shapes) -> dict[str, float]:
    stage.run(batch, Runner(lambda loss: loss.backward()))
    return {"peak": shapes.peak}


def _distill(pair: TeacherStudent, batch: Batch, shapes: Shapes) -> dict[str, float]:
    """The teacher's trunk, and the student's there and back; what comes after the trunk is the loss's."""
    with torch.no_grad():
        pair.teacher.base_model(**model_inputs(pair.teacher, batch, pair.spec))
    found: dict[str, float] = {"teacher": shapes.peak}
    layer = find_layers(pair.student, pair.spec.layers)[0]
    around: list[int] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden_bld = args[0] if args else kwargs["hidden_states"]
        found["entering"] = hidden_bld.numel() * hidden_bld.element_size()
        around.append(shapes.bytes)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        around.append(shapes.bytes)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    hidden_bld = pair.student.base_model(**model_inputs(pair.student, batch, pair.spec))[0]
    for handle in handles:
        handle.remove()
    found["kept"] = around[1] - around[0]
    found["ends"] = shapes.bytes - found["kept"]
    shapes.peak = kept = shapes.bytes
    hidden_bld.backward(torch.zeros_like(hidden_bld))
    found["passing"] = shapes.peak - kept
    return found


def _one_layer(config: PretrainedConfig, adapter: Adapter, spec: StudentSpec, dtype: torch.dtype) -> TeacherStudent:
    """Teacher and student of one layer, that of the widest mixer, on the meta device."""
    first = spec.widest_layer
    teacher_class, student_class = getattr(transformers, adapter.model_class), classes_for(adapter)[1]
    with torch.device("meta"):
        teacher = teacher_class._from_config(
            deepcopy(config), attn_implementation=attention_implementation(teacher_class, config), dtype=dtype
        )
        student = student_class(student_config(config, adapter, spec.mixer_entry())).float()
    for model in (teacher, student):
        layers = find_layers(model, spec.layers)
        layers[0] = layers[first]
        del layers[1:]
        model.config.num_hidden_layers = 1
    spec = replace(spec, layer_specs=spec.layer_specs[first : first + 1])
    return TeacherStudent(teacher.eval(), student.eval(), spec, adapter)


def _without_numbers(model: PreTrainedModel) -> None:
    """Put a tensor without numbers in the place of every tensor; what was shared stays shared."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, replaced[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _learn(student: PreTrainedModel, learns: Callable[[str, nn.Parameter], bool]) -> None:
    """Give gradients to what learns, so that those of a step are added to what is there, and freeze the rest."""
    for name, parameter in student.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(learns(name, parameter))
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
