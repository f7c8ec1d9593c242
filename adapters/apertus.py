"""Apertus."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that mlx-lm requires and transformers implies."""
    return {"mlp_bias": False, "post_norm": False, "qk_norm": True}


ADAPTER = Adapter(
    model_type="apertus",
    title="Apertus",
    examples=("swiss-ai/Apertus-8B-Instruct-2509",),
    notes=(
        "Queries and keys are normalised per head.",
        "An MLP without a gate, whose activation has learned parameters.",
    ),
    model_class="ApertusForCausalLM",
    config_class="ApertusConfig",
    qk_norms=("q_norm", "k_norm"),
    mlx_module="apertus",
    mlx_config=mlx_config,
)
