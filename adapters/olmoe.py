"""OLMoE, a mixture of experts."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="olmoe",
    title="OLMoE",
    examples=("allenai/OLMoE-1B-7B-0125-Instruct",),
    notes=(
        "Experts and their router are copied.",
        "Queries and keys are normalised over all heads together, values may be clipped.",
    ),
    model_class="OlmoeForCausalLM",
    config_class="OlmoeConfig",
    tiny_config={"num_experts_per_tok": 2, "num_experts": 4, "clip_qkv": 0.4},
    qk_norms=("q_norm", "k_norm"),
    mlx_module="olmoe",
    mlx_tiny_config={"clip_qkv": None},
)
