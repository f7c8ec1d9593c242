"""Heads of the teacher's attention beside the heads of a mixer, in the family's own module. Travels with exports.

Shapes: b batch, l length, s source position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of attention modules with the number of query heads, of key heads, and of query heads per key head.
_QUERY_COUNTS = ("num_heads", "num_attention_heads")
_KEY_COUNTS = ("num_key_value_heads",)
_RATIO = "num_key_value_groups"
_INPUTS = ("q_proj", "k_proj", "v_proj")


class MixerBesideAttention(nn.Module):
    """A layer's mixer and the heads of attention that it keeps: the sum of their outputs.

    That is one output projection over the heads of both, in two parts.

    Args:
        mixer: the mixer of the replaced heads.
        attention: the family's module with the kept heads.
    """

    def __init__(self, mixer: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.mixer, self.attention = mixer, attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map hidden states (b, l, d) as the attention module did; see `Mixer.forward`."""
        attended = self.attention(hidden_states, *args, **kwargs)[0]
        mixed, _ = self.mixer(hidden_states, *args, **kwargs)
        return mixed + attended, None


def cut_heads(attention: nn.Module, heads: Sequence[int], head_dim: int) -> None:
    """Leave an attention module with some of its query heads and their keys and values, in place.

    Its output projection loses the bias: that of the mixer beside it has it.

    Args:
        attention: a family's module, on any device.
        heads: numbers of the query heads, in ascending order.
        head_dim: width of a head.

    Raises:
        ValueError: the module keeps its heads in another form.
    """
    reason = cannot_cut(attention, head_dim)
    if reason is not None:
        raise ValueError(f"found a {type(attention).__name__}, which {reason}: its heads cannot be kept one by one")
    module: Any = attention
    num_heads, num_keys = (proj.out_features // head_dim for proj in (module.q_proj, module.k_proj))
    keys = key_heads(heads, num_heads // num_keys)
    for name, kept in zip(_INPUTS, (heads, keys, keys), strict=True):
        proj = getattr(module, name)
        proj.weight = _rows(proj.weight, kept, head_dim)
        proj.bias = None if proj.bias is None else _rows(proj.bias, kept, head_dim)
        proj.out_features = len(proj.weight)
    out = output_projection(module)
    out.weight = nn.Parameter(_rows(out.weight.T, heads, head_dim).detach().T.contiguous())
    out.bias, out.in_features = None, out.weight.shape[1]
    for norm in _norms(module):
        if norm.weight.shape == (num_heads, head_dim):
            norm.weight = nn.Parameter(norm.weight.detach()[list(heads)])
        elif norm.weight.shape == (num_keys, head_dim):
            norm.weight = nn.Parameter(norm.weight.detach()[list(keys)])
    counts = {**dict.fromkeys(_QUERY_COUNTS, len(heads)), **dict.fromkeys(_KEY_COUNTS, len(keys))}
    counts[_RATIO] = len(heads) // len(keys)
    for name, count in counts.items():
        if hasattr(module, name):
            setattr(module, name, count)


def key_heads(heads: Sequence[int], repeats: int) -> tuple[int, ...]:
    """The key heads that some query heads need, every one for as many of them.

    A key head is there several times where more of its query heads are kept than of others.

    Args:
        heads: the query heads, in ascending order.
        repeats: the teacher's query heads per key head.
    """
    groups = [head // repeats for head in heads]
    return tuple(groups[:: math.gcd(*(groups.count(group) for group in groups))])


def cannot_cut(attention: nn.Module, head_dim: int) -> str | None:
    """Why single heads of an attention module cannot be kept, as the end of a sentence; None if they can."""
    if not all(isinstance(getattr(attention, name, None), nn.Linear) for name in _INPUTS):
        return "has no queries, keys and values in matrices of their own"
    widths = {module.weight.shape for module in _norms(attention)}
    many = any(len(shape) == 1 and shape[0] != head_dim for shape in widths)
    if many or any(isinstance(module, nn.ModuleList) for module in attention.modules()):
        return "has norms over several heads, or one for every head"
    return None


def output_projection(attention: nn.Module) -> Any:
    """The output projection of an attention module that `cannot_cut` has nothing against."""
    linears = [(name, child) for name, child in attention.named_children() if isinstance(child, nn.Linear)]
    (out,) = [child for name, child in linears if name not in _INPUTS]
    return out


def _norms(attention: nn.Module) -> list[Any]:
    """The modules of queries and keys that have a weight, beside the projections."""
    return [child for child in attention.children() if hasattr(child, "weight") and not isinstance(child, nn.Linear)]


def _rows(weight: Tensor, heads: Sequence[int], head_dim: int) -> nn.Parameter:
    """The rows of some heads, as a parameter of its own."""
    return nn.Parameter(weight.detach().unflatten(0, (-1, head_dim))[list(heads)].flatten(0, 1))


def narrow(attention: nn.Module, window: int) -> None:
    """Let an attention module reach back to the last tokens only, whatever its family does."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        implementation = module.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"found the attention implementation {implementation} with a window of kept heads, expected sdpa or"
                " eager"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        past = 0 if cache is None else min(cache.get_seq_length(module.layer_idx), window - 1)
        mask = windowed(kwargs["attention_mask"], hidden.shape[1], past, window, hidden.device)
        return args, {**kwargs, "attention_mask": mask}

    attention.register_forward_pre_hook(before, with_kwargs=True)


def windowed(mask: Tensor | None, length: int, past: int, window: int, device: torch.device) -> Tensor | None:
    """The mask of attention to the last ``window`` tokens.

    Args:
        mask: that of full attention, (b, h or 1, l, at least s) with the keys at its end: true where attention is
            allowed, or a number that is added; None where everything before is allowed.
        length: l.
        past: keys before these tokens, of which there are at most ``window - 1``.
        window: tokens, the current one included.
        device: where the mask is.
    """
    num_keys = past + length
    if mask is not None:
        mask = mask[..., -num_keys:]
    if num_keys <= window:
        return mask
    distance_ls = torch.arange(past, num_keys, device=device).unsqueeze(1) - torch.arange(num_keys, device=device)
    near_ls = distance_ls < window
    if mask is None:
        return (near_ls & (distance_ls >= 0)).expand(1, 1, -1, -1)
    return mask & near_ls if mask.dtype == torch.bool else mask.masked_fill(~near_ls, torch.finfo(mask.dtype).min)
