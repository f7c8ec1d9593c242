"""Gemma 1."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="gemma",
    title="Gemma",
    examples=("google/gemma-2b-it", "google/gemma-7b-it"),
    notes=(
        "Embeddings are multiplied by the root of the hidden size; that is the teacher's own code.",
        "The head dimension is larger than the hidden size divided by the heads.",
    ),
    model_class="GemmaForCausalLM",
    config_class="GemmaConfig",
    tiny_config={"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
    mlx_module="gemma",
    mlx_tiny_config={"hidden_act": "gelu_python"},
)
