"""Llama 1 to 3.x and the many checkpoints that share its type."""

from mohawkify.adapter import Adapter

ADAPTER = Adapter(
    model_type="llama",
    title="Llama",
    examples=(
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.2-3B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    odd=(
        "Grouped key heads: each is repeated for its query heads.",
        "The head is tied to the embedding in small models.",
    ),
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    mlx_module="llama",
)
