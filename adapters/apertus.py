"""Apertus."""

from mohawkify.adapter import Adapter

ADAPTER = Adapter(
    model_type="apertus",
    title="Apertus",
    examples=("swiss-ai/Apertus-8B-Instruct-2509",),
    odd=(
        "Queries and keys are normalised per head.",
        "An MLP without a gate, whose activation has learned parameters.",
    ),
    model_class="ApertusForCausalLM",
    config_class="ApertusConfig",
    qk_norms=("q_norm", "k_norm"),
    mlx_module="apertus",
)
