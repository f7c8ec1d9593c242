"""Qwen3 mixtures of experts."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="qwen3_moe",
    title="Qwen3 MoE",
    examples=("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
    notes=(
        "Experts and their router are copied.",
        "Queries and keys are normalised per head.",
        "The head dimension need not be the hidden size divided by the heads.",
    ),
    model_class="Qwen3MoeForCausalLM",
    config_class="Qwen3MoeConfig",
    tiny_config={
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 12,
        "mlp_only_layers": [1],
    },
    qk_norms=("q_norm", "k_norm"),
    mlx_module="qwen3_moe",
)
