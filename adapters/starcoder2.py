"""StarCoder2."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="starcoder2",
    title="StarCoder2",
    examples=("bigcode/starcoder2-3b", "bigcode/starcoder2-15b"),
    notes=(
        "LayerNorm with biases, and biases in every projection.",
        "A sliding window in every layer; stage 1 takes it from the teacher's mask.",
    ),
    model_class="Starcoder2ForCausalLM",
    config_class="Starcoder2Config",
    tiny_config={"sliding_window": 5, "use_bias": True},
    mlx_module="starcoder2",
    mlx_tiny_config={"hidden_act": "gelu", "sliding_window": None},
)
