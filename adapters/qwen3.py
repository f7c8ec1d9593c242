"""Qwen3 dense models."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="qwen3",
    title="Qwen3",
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    notes=(
        "Queries and keys are normalised per head; stage 1 captures the result, the attention start folds the weights.",
        "The head dimension need not be the hidden size divided by the heads.",
    ),
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    tiny_config={"head_dim": 12},
    qk_norms=("q_norm", "k_norm"),
    mlx_module="qwen3",
    mamba2="layers",
)
