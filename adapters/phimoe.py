"""Phi-3.5-MoE."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="phimoe",
    title="Phi-3.5 MoE",
    examples=("microsoft/Phi-3.5-MoE-instruct",),
    notes=(
        "Experts and their router are copied.",
        "Its router draws at random in training mode; students train in evaluation mode.",
        "router_jitter_noise also decides how near a second expert must come, and stays the teacher's.",
        "LayerNorm with biases, and biases in the projections and the head.",
    ),
    model_class="PhimoeForCausalLM",
    config_class="PhimoeConfig",
    tiny_config={
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 5,
    },
    mlx_module="phimoe",
    mlx_tiny_config={"sliding_window": None},
)
