"""Qwen3 dense models."""

from dataclasses import replace
from typing import Any

from mohawkify.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Fold the weights of the query and key norms into the projections; their division by the length cannot be."""
    from mohawkify.student.transfer import read_projections

    weights = read_projections(attention)
    q_scale_p, k_scale_p = attention.q_norm.weight, attention.k_norm.weight
    return replace(weights, q_hpd=weights.q_hpd * q_scale_p[:, None], k_gpd=weights.k_gpd * k_scale_p[:, None])


ADAPTER = Adapter(
    model_type="qwen3",
    title="Qwen3",
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    odd=(
        "Queries and keys are normalised per head; stage 1 sees the result, the attention start folds in the weights.",
        "The head width need not be the model width divided by the heads.",
    ),
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    read_weights=read_weights,
    mlx_module="qwen3",
)
