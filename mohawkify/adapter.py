"""What a family file in `adapters/` says about its teachers: data first, functions only where a family differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """One attention module's projections, head by head; the source of the attention start.

    Shapes: h query heads, g key heads, p head width, d model width. A bias is None where the family has none.
    Scales such as the weight of a query norm are folded in; 1/sqrt(p) is not.
    """

    q_hpd: Tensor
    k_gpd: Tensor
    v_gpd: Tensor
    out_dhp: Tensor
    q_bias_hp: Tensor | None = None
    k_bias_gp: Tensor | None = None
    v_bias_gp: Tensor | None = None
    out_bias_d: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """A family of teachers that share transformers' ``model_type``; the file's name is that type.

    Args:
        model_type: the key in ``config.json``.
        title: the family's name as people write it.
        examples: checkpoints people use.
        odd: what is particular about the family and where it is handled, a sentence each.
        model_class: the causal language model class in transformers.
        config_class: its configuration class in transformers.
        layers: attribute path from the model to its list of decoder layers.
        attention: attribute of a decoder layer that holds the attention module.
        read_weights: reads an attention module's projections; None uses q_proj, k_proj, v_proj and o_proj.
        mlx_module: the module of ``mlx_lm.models`` that has the family; None where mlx-lm has not.
    """

    model_type: str
    title: str
    examples: tuple[str, ...]
    odd: tuple[str, ...]
    model_class: str
    config_class: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    read_weights: Callable[[Any], AttentionWeights] | None = None
    mlx_module: str | None = None
