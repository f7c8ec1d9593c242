"""Qwen1.5-MoE and Qwen2-MoE."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="qwen2_moe",
    title="Qwen2 MoE",
    examples=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
    notes=(
        "Experts, and one more that every token passes through behind a gate; all are copied with the router.",
        "Queries, keys and values have biases.",
    ),
    model_class="Qwen2MoeForCausalLM",
    config_class="Qwen2MoeConfig",
    tiny_config={
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
    },
    mlx_module="qwen2_moe",
)
