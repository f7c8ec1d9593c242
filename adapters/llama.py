"""Llama 1 to 3.x and the many checkpoints that share its type."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="llama",
    title="Llama",
    examples=(
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M",
        "tiiuae/Falcon3-7B-Instruct",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    notes=(
        "Grouped key heads: each is repeated for its query heads.",
        "The head is tied to the embedding in small models.",
        "Llama 3.x stretches its rotary frequencies; queries and keys are captured after that.",
    ),
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    tiny_config={
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    mlx_module="llama",
    mamba2="hybrids",
)
