"""Mistral 7B, Nemo and their relatives."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="mistral",
    title="Mistral",
    examples=("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-Nemo-Instruct-2407"),
    notes=(
        "Version 0.1 uses a sliding window in every layer; stage 1 takes it from the teacher's mask.",
        "The head dimension need not be the hidden size divided by the heads.",
    ),
    model_class="MistralForCausalLM",
    config_class="MistralConfig",
    tiny_config={"sliding_window": 5, "head_dim": 12},
    mlx_module="llama",
    mamba2="hybrids",
)
