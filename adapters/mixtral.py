"""Mixtral, a mixture of experts."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="mixtral",
    title="Mixtral",
    examples=("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    notes=(
        "Experts instead of one MLP; they and their router are copied.",
        "May use a sliding window, which stage 1 takes from the teacher's mask.",
    ),
    model_class="MixtralForCausalLM",
    config_class="MixtralConfig",
    tiny_config={"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": 5},
    mlx_module="mixtral",
    mlx_tiny_config={"sliding_window": None},
)
