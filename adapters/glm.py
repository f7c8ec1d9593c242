"""GLM-4 of 2024 and GLM-Edge."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="glm",
    title="GLM-4 (2024)",
    examples=("zai-org/glm-4-9b-chat-hf", "zai-org/glm-edge-1.5b-chat"),
    notes=(
        "Neighbouring features of a head are rotated together, and only half of them.",
        "Queries, keys and values have biases.",
        "Gate and up projection lie in one matrix.",
    ),
    model_class="GlmForCausalLM",
    config_class="GlmConfig",
    tiny_config={
        "head_dim": 12,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    mlx_module="glm",
    mlx_tiny_config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
)
