"""The description of a family that a file in `adapters/` gives: data first, functions only where a family differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from mohawkify.ops.mixing_matrices import AttentionMatrix


@dataclass(frozen=True)
class AttentionWeights:
    """One attention module's projections, head by head; the source of the attention start.

    Shapes: h query heads, g key heads, p head_dim, d hidden_size. A bias is None where the family has none.
    Scales such as the weight of a query norm are folded in; ``scaling`` is not.

    Args:
        scaling: factor on the products of queries and keys; None is 1/sqrt(p).
    """

    q_hpd: Tensor
    k_gpd: Tensor
    v_gpd: Tensor
    out_dhp: Tensor
    q_bias_hp: Tensor | None = None
    k_bias_gp: Tensor | None = None
    v_bias_gp: Tensor | None = None
    out_bias_d: Tensor | None = None
    scaling: float | None = None

    def of_heads(self, heads: Sequence[int]) -> AttentionWeights:
        """The projections of some query heads, each with keys and values of its own; all keep the output's bias."""
        if len(heads) == len(self.q_hpd):
            return self
        chosen, repeats = list(heads), len(self.q_hpd) // len(self.k_gpd)
        groups = [head // repeats for head in chosen]
        return replace(
            self,
            q_hpd=self.q_hpd[chosen],
            k_gpd=self.k_gpd[groups],
            v_gpd=self.v_gpd[groups],
            out_dhp=self.out_dhp[:, chosen],
            q_bias_hp=None if self.q_bias_hp is None else self.q_bias_hp[chosen],
            k_bias_gp=None if self.k_bias_gp is None else self.k_bias_gp[groups],
            v_bias_gp=None if self.v_bias_gp is None else self.v_bias_gp[groups],
        )


@dataclass(frozen=True)
class Logits:
    """How a family's logits follow from the output of its head, a linear layer.

    They are multiplied, then divided, then bounded by ``cap * tanh(logit / cap)``. With these, stage 3 and the
    comparison of student and teacher hold the logits of a few tokens at a time.

    Args:
        multiplier: key of the configuration with the factor; None for none.
        divisor: key of the configuration with the divisor; None for none.
        softcap: key of the configuration with the cap, whose value None is none; None where the family has no cap.
        unknown: why these keys do not describe the logits, so that the model computes them, all at once; else None.
    """

    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    unknown: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A family of teachers that share transformers' ``model_type``; the file's name is that type.

    Args:
        model_type: the key in ``config.json``.
        title: the family's name in prose.
        examples: checkpoints people use.
        notes: the family's peculiarities and how each is handled, a sentence each.
        model_class: the causal language model class in transformers.
        config_class: its configuration class in transformers.
        tiny_config: keys of a small model's configuration, beyond the usual sizes, that switch on the family's
            peculiarities; its tests run on that model.
        layers: attribute path from the model to its list of decoder layers.
        attention: attribute of a decoder layer that holds the attention module.
        out_proj: attribute of the attention module that holds its output projection.
        qk_norms: attributes of the attention module that hold the norms of queries and keys, if there are any.
        read_weights: reads an attention module's projections; None uses q_proj, k_proj, v_proj and ``out_proj``.
        capture: rebuilds what an attention module computed from the module, its input and the keywords of its call;
            only for families that do not attend through transformers' attention interface.
        refuse: returns the reason why a configuration of the family cannot be converted, or None.
        logits: how logits are computed from the head's output; by default they are that output.
        packs_by_mask: the model ignores document borders in ``position_ids``; it is called with a mask that has them.
        reads_mask: decoder layers keep ``position_ids`` or further keywords from their attention; mixers then read
            borders and padding from the mask that the model builds.
        mlx_module: the module of ``mlx_lm.models`` that has the family; None where mlx-lm has not.
        mlx_config: further keys that mlx-lm's model reads, from the student's configuration; None where it needs none.
        mlx_prefix: start of the tensors' names that mlx-lm expects to be cut off.
        mlx_counts_tokens: mlx-lm's model has learned positions, and reads the next one from its first layer's cache.
        mlx_tiny_config: changes of ``tiny_config`` for the tests of MLX, where mlx-lm's model lacks a feature.
        mamba2: ``layers`` where all but attention is as in transformers' GraniteMoeHybrid, RMS norms and SwiGLU under
            Llama's names; ``hybrids`` where attention is Granite's too; None where neither is.
        autodetected: read from the modules of a family without a file; verified on the weights before a run trains.
    """

    model_type: str
    title: str
    examples: tuple[str, ...]
    notes: tuple[str, ...]
    model_class: str
    config_class: str
    tiny_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    layers: str = "model.layers"
    attention: str = "self_attn"
    out_proj: str = "o_proj"
    qk_norms: tuple[str, str] | None = None
    read_weights: Callable[[Any], AttentionWeights] | None = None
    capture: Callable[[Any, Tensor, Mapping[str, Any]], AttentionMatrix] | None = None
    refuse: Callable[[Any], str | None] | None = None
    logits: Logits = field(default_factory=Logits)
    packs_by_mask: bool = False
    reads_mask: bool = False
    mlx_module: str | None = None
    mlx_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    mlx_prefix: str = ""
    mlx_counts_tokens: bool = False
    mlx_tiny_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mamba2: Literal["layers", "hybrids"] | None = None
    autodetected: bool = False
