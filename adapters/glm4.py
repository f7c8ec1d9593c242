"""GLM-4-0414."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="glm4",
    title="GLM-4 (2025)",
    examples=("zai-org/GLM-4-9B-0414", "zai-org/GLM-4-32B-0414"),
    notes=(
        "Norms before and after attention and MLP.",
        "Neighbouring features of a head are rotated together, and only half of them.",
        "Gate and up projection lie in one matrix.",
    ),
    model_class="Glm4ForCausalLM",
    config_class="Glm4Config",
    tiny_config={
        "head_dim": 12,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    mlx_module="glm4",
)
