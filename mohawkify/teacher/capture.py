"""Hooks into the teacher's own full forward pass: queries and keys, and the input and output of each layer.

Shapes: b batch, h query heads, g key heads, l target position, s source position, p head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from mohawkify.errors import TeacherError
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import find_layers
from mohawkify.ops.mixing_matrices import AttentionMatrix

CAPTURE = "mohawk_capture"
# Keywords of attention functions that change the matrix in ways `AttentionMatrix` does not hold.
CHANGES_ATTENTION = ("s_aux", "position_bias", "alibi")


class LayerCall(NamedTuple):
    """One call of a module in the teacher's forward pass: its input, its other arguments and its output."""

    layer: int
    hidden_bld: Tensor
    further: tuple[Any, ...]
    arguments: dict[str, Any]
    output_bld: Tensor
    attention: AttentionMatrix | None


def capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' interface: attends, and leaves queries and keys on the module."""
    unknown = [name for name in CHANGES_ATTENTION if kwargs.get(name) is not None]
    if unknown:
        raise TeacherError(f"{type(module).__name__} attends with {unknown[0]}, which stage 1 does not know yet")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    captured = AttentionMatrix(
        query, key, scaling, attention_mask, softcap, value_norms_bgs=torch.linalg.vector_norm(value, dim=-1)
    )
    module.captured_attention = captured  # type: ignore[assignment]
    repeats = query.shape[1] // key.shape[1]
    if softcap is None:
        keys, values = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask, scale=scaling)
    else:
        output = captured.probabilities().to(value.dtype) @ value.repeat_interleave(repeats, dim=1)
    return output.transpose(1, 2).contiguous(), None


def explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask, always written out: causal, windowed and within documents as the model builds it."""
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        raise TeacherError("the teacher attends without a mask: it sees the future")
    return mask


def register_capture() -> None:
    """Register the capturing attention with transformers."""
    AttentionInterface.register(CAPTURE, capturing_attention)
    AttentionMaskInterface.register(CAPTURE, explicit_mask)


@contextmanager
def capture_attention(teacher: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """Within the block every attention module leaves what it computed for `layer_hooks`.

    The teacher attends through `capturing_attention` or, in families that do not use transformers' interface, the
    adapter rebuilds it from the module's call.
    """
    if adapter.capture is not None:
        with _rebuilding(teacher, adapter):
            yield
        return
    register_capture()
    before = teacher.config._attn_implementation
    teacher.set_attn_implementation(CAPTURE)
    try:
        yield
    finally:
        teacher.set_attn_implementation(before)


@contextmanager
def _rebuilding(teacher: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    rebuild = adapter.capture
    assert rebuild is not None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, _, arguments = _split_call(args, kwargs)
        module.captured_attention = rebuild(module, hidden, arguments)  # type: ignore[assignment]

    attentions = [getattr(layer, adapter.attention) for layer in find_layers(teacher, adapter.layers)]
    handles = [attention.register_forward_hook(hook, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A module's call as its hidden states, what else it was given by place, and its other keywords."""
    if args:
        return args[0], args[1:], dict(kwargs)
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


@contextmanager
def layer_hooks(modules: dict[int, nn.Module], on_call: Callable[[LayerCall], None]) -> Iterator[None]:
    """Within the block, ``on_call`` runs after each forward of the given modules, with gradients enabled.

    Args:
        modules: decoder layers or attention modules by layer index.
        on_call: receives the call; what it does not keep is freed before the next layer runs.
    """

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden, further, arguments = _split_call(args, kwargs)
            attention = module.__dict__.pop("captured_attention", None)
            first = output[0] if isinstance(output, tuple) else output
            with torch.enable_grad():
                on_call(LayerCall(index, hidden, further, arguments, first, attention))

        return hook

    handles = [module.register_forward_hook(hook_for(index), with_kwargs=True) for index, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
