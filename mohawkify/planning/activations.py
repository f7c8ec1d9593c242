"""How much memory one layer takes on its way through each stage: the stages' own code, run on tensors without numbers.

PyTorch's fake tensors have shapes and types but no memory, so a layer of any size is counted in a second, with the
family's own code, and what is counted follows that code when it changes.

Shapes: b batch, l length.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel

from mohawkify.data.packing import Batch
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import attention_implementation, find_layers
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.objective import Runner, TeacherStudent, model_inputs, run_trunk
from mohawkify.objectives.trainable import mixers_by_layer
from mohawkify.planning.memory import Footprint
from mohawkify.recipe.schema import Recipe
from mohawkify.student.build import classes_for, student_config
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks


class _Live(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, and remembers the most there were.

    Args:
        model_tensors: tensors that were there before and do not count.
    """

    def __init__(self, model_tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in model_tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def on_free(_: object) -> None:
            self.bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, on_free)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def count_footprint(config: PretrainedConfig, adapter: Adapter, student: StudentSpec, recipe: Recipe) -> Footprint:
    """Count what one sequence takes in one layer, in every stage.

    Args:
        config: the teacher's configuration.
        adapter: its family.
        student: the student's facts; its first grafted layer stands for all layers.
        recipe: precision, lengths and what is trained.

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
    with _without_log(), FakeTensorMode():
        _without_numbers(pair.teacher)
        _without_numbers(pair.student)
        pair.teacher.requires_grad_(False)
        align = HiddenStateObjective(pair, recipe.stages.align)
        trained = align.parameters()

        def count(function: Callable[[Batch, _Live], dict[str, float]], length: int) -> dict[str, float]:
            return _per_sequence(lambda batch: _watched(pair, function, batch, is_half), length)

        # The gradient of an embedding would hide everything else: it is the loss's to count, as the head's is.
        tables = {id(p) for m in pair.student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        _learn(pair.student, lambda name, parameter: id(parameter) not in tables)
        pair.student.enable_input_require_grads()
        orient = count(lambda batch, live: _orient(pair, batch, live), lengths["orient"])
        distill = count(lambda batch, live: _distill(pair, batch, live), lengths["distill"])
        _learn(pair.student, lambda name, _: name in trained)
        aligned = count(lambda batch, live: _align(align, batch, live), lengths["align"])
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
    pair: TeacherStudent, function: Callable[[Batch, _Live], dict[str, float]], batch: Batch, is_half: bool
) -> dict[str, float]:
    """Run a function with a counter of the memory in use beside the models, their gradients and the batch."""
    there = [tensor for model in (pair.teacher, pair.student) for tensor in (*model.parameters(), *model.buffers())]
    there += [parameter.grad for parameter in pair.student.parameters() if parameter.grad is not None]
    live = _Live([*there, *batch])
    with live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
        return function(batch, live)


def _batch(num_sequences: int, length: int) -> Batch:
    ids_bl = torch.zeros(num_sequences, length, dtype=torch.long)
    return Batch(ids_bl, torch.arange(length).expand(num_sequences, -1), torch.ones_like(ids_bl, dtype=torch.bool))


def _orient(pair: TeacherStudent, batch: Batch, live: _Live) -> dict[str, float]:
    """Stage 1 without the bands of its matrices, which `memory` adds: a layer's B, C and decay, and back."""
    mixers = mixers_by_layer(pair.student, pair.spec)
    found: dict[str, float] = {}

    def on_attention(call: LayerCall) -> None:
        parts = mixers[call.layer].mixing_parts(call.hidden_bld, batch.position_ids == 0)
        found["parts"] = live.bytes
        made = [part for part in parts if part.grad_fn is not None]
        torch.autograd.backward(made, [torch.zeros_like(part) for part in made])

    attentions = mixers_by_layer(pair.teacher, pair.spec)
    with torch.no_grad(), capture_attention(pair.teacher, pair.adapter), layer_hooks(attentions, on_attention):
        run_trunk(pair.teacher, batch, pair.spec)
    return {**found, "peak": live.peak}


def _align(stage: HiddenStateObjective, batch: Batch, live: _Live) -> dict[str, float]:
    stage.run(batch, Runner(lambda loss: loss.backward()))
    return {"peak": live.peak}


def _distill(pair: TeacherStudent, batch: Batch, live: _Live) -> dict[str, float]:
    """The teacher's trunk, and the student's there and back; what comes after the trunk is the loss's."""
    with torch.no_grad():
        pair.teacher.base_model(**model_inputs(pair.teacher, batch, pair.spec))
    found: dict[str, float] = {"teacher": live.peak}
    layer = find_layers(pair.student, pair.spec.layers)[0]
    around: list[int] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden_bld = args[0] if args else kwargs["hidden_states"]
        found["entering"] = hidden_bld.numel() * hidden_bld.element_size()
        around.append(live.bytes)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        around.append(live.bytes)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    hidden_bld = pair.student.base_model(**model_inputs(pair.student, batch, pair.spec))[0]
    for handle in handles:
        handle.remove()
    found["kept"] = around[1] - around[0]
    found["ends"] = live.bytes - found["kept"]
    live.peak = kept = live.bytes
    hidden_bld.backward(torch.zeros_like(hidden_bld))
    found["passing"] = live.peak - kept
    return found


def _one_layer(config: PretrainedConfig, adapter: Adapter, spec: StudentSpec, dtype: torch.dtype) -> TeacherStudent:
    """Teacher and student of one layer, the first that is grafted, on the meta device."""
    first = spec.mixer_layers[0]
    teacher_class, student_class = getattr(transformers, adapter.model_class), classes_for(adapter)[1]
    with torch.device("meta"):
        teacher = teacher_class._from_config(
            deepcopy(config), attn_implementation=attention_implementation(teacher_class, config), dtype=dtype
        )
        student = student_class(student_config(config, adapter, spec.mixer_config())).float()
    for model in (teacher, student):
        layers = find_layers(model, spec.layers)
        layers[0] = layers[first]
        del layers[1:]
        model.config.num_hidden_layers = 1
    spec = replace(spec, layer_specs=spec.layer_specs[first : first + 1])
    return TeacherStudent(teacher.eval(), student.eval(), spec, adapter)


def _without_numbers(model: PreTrainedModel) -> None:
    """Put a fake tensor in the place of every tensor; what was shared stays shared."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in fakes:
                fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, fakes[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _learn(student: PreTrainedModel, learns: Callable[[str, nn.Parameter], bool]) -> None:
    """Give gradients to what learns, so that those of a step are added to what is there, and freeze the rest."""
    for name, parameter in student.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(learns(name, parameter))
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep what PyTorch prints about code that cannot run without numbers off the terminal."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
