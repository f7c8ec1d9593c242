"""An attention module's projections cut into heads, whatever its family calls them.

Shapes: h query heads, g key heads, p head_dim, d hidden_size, f rows of a projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from mohawkify.errors import TeacherError
from mohawkify.families.adapter import Adapter, AttentionWeights


def read_attention(adapter: Adapter, attention: Any) -> AttentionWeights:
    """Read an attention module of a family by its adapter; works on the meta device too.

    The weights of its query and key norms are folded in; their division by the length cannot be.
    """
    read = adapter.read_weights
    weights = read(attention) if read else read_projections(attention, adapter.out_proj)
    q_norm, k_norm = (getattr(attention, name, None) for name in adapter.qk_norms or ("", ""))
    if q_norm is None or k_norm is None:  # switched off in this teacher
        return weights
    return fold_scales(weights, q_norm.weight, k_norm.weight)


class Rows(NamedTuple):
    """The rows of a projection that belong together: weight (f, d) and bias (f,), as ``nn.Linear`` has them."""

    weight_fd: Tensor
    bias_f: Tensor | None

    def between(self, begin: int, end: int | None) -> Rows:
        """A part of the rows, for families that keep several projections in one matrix."""
        return Rows(self.weight_fd[begin:end], None if self.bias_f is None else self.bias_f[begin:end])


def rows_of(linear: Any) -> Rows:
    """All rows of a linear module."""
    return Rows(linear.weight, linear.bias)


def interleaved_rows(linear: Any, heads: tuple[int, ...], width: int) -> list[Rows]:
    """The rows of projections that share a matrix group by group.

    Args:
        linear: the linear module; a group holds the heads of every projection, one projection after the other.
        heads: heads of each projection in a group.
        width: p, rows per head.
    """
    groups_weight = linear.weight.unflatten(0, (-1, sum(heads) * width))
    groups_bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, sum(heads) * width))
    parts, begin = [], 0
    for count in heads:
        part = slice(begin, begin + count * width)
        bias_f = None if groups_bias is None else groups_bias[:, part].flatten()
        parts.append(Rows(groups_weight[:, part].flatten(0, 1), bias_f))
        begin += count * width
    return parts


def cut_into_heads(query: Rows, key: Rows, value: Rows, out: Rows, width: int, scaling: float) -> AttentionWeights:
    """Cut an attention module's projections into heads.

    Args:
        query: rows of all query heads, one head after the other.
        key: rows of the key heads.
        value: rows of the value heads.
        out: the output projection, whose columns are the heads'.
        width: p, rows per head.
        scaling: what the module multiplies products of queries and keys by.
    """

    def heads(rows: Rows) -> tuple[Tensor, Tensor | None]:
        bias = None if rows.bias_f is None else rows.bias_f.unflatten(0, (-1, width))
        return rows.weight_fd.unflatten(0, (-1, width)), bias

    q_hpd, q_bias_hp = heads(query)
    k_gpd, k_bias_gp = heads(key)
    v_gpd, v_bias_gp = heads(value)
    return AttentionWeights(
        q_hpd=q_hpd,
        k_gpd=k_gpd,
        v_gpd=v_gpd,
        out_dhp=out.weight_fd.unflatten(1, (-1, width)),
        q_bias_hp=q_bias_hp,
        k_bias_gp=k_bias_gp,
        v_bias_gp=v_bias_gp,
        out_bias_d=out.bias_f,
        scaling=scaling,
    )


def read_projections(attention: Any, out: str = "o_proj") -> AttentionWeights:
    """Read q_proj, k_proj, v_proj and the output projection; most families have them.

    Args:
        attention: the attention module.
        out: the name of the output projection.

    Raises:
        TeacherError: one of them is missing.
    """
    for name in ("q_proj", "k_proj", "v_proj", out, "head_dim", "scaling"):
        if not hasattr(attention, name):
            raise TeacherError(
                f"{type(attention).__name__} has no {name}", hint="its adapter needs a read_weights function"
            )
    query, key, value = (rows_of(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
    return cut_into_heads(query, key, value, rows_of(getattr(attention, out)), attention.head_dim, attention.scaling)


def fold_scales(weights: AttentionWeights, q_scale: Tensor, k_scale: Tensor) -> AttentionWeights:
    """Multiply queries and keys by the fixed scales of their norms.

    Args:
        weights: the projections.
        q_scale: (p,) for every head alike, or (h, p) or (h * p,) for each.
        k_scale: the same for the key heads.
    """

    def scaled(weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        heads, width = weight.shape[:2]
        per_head = scale.expand(heads, width) if scale.shape == (width,) else scale.reshape(heads, width)
        return weight * per_head.unsqueeze(-1), None if bias is None else bias * per_head

    q_hpd, q_bias_hp = scaled(weights.q_hpd, weights.q_bias_hp, q_scale)
    k_gpd, k_bias_gp = scaled(weights.k_gpd, weights.k_bias_gp, k_scale)
    return replace(weights, q_hpd=q_hpd, k_gpd=k_gpd, q_bias_hp=q_bias_hp, k_bias_gp=k_bias_gp)
