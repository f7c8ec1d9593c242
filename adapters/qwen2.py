"""Qwen2 and Qwen2.5, and distilled models that share the type."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="qwen2",
    title="Qwen2, Qwen2.5",
    examples=("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
    notes=(
        "Queries, keys and values have biases; they become biases of the mixer's convolution.",
        "Layers above max_window_layers may use a sliding window; stage 1 takes it from the teacher's mask.",
    ),
    model_class="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    tiny_config={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    mlx_module="qwen2",
    mamba2="hybrids",
)
