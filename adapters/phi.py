"""Phi-1, Phi-1.5 and Phi-2."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="phi",
    title="Phi",
    examples=("microsoft/phi-1_5", "microsoft/phi-2"),
    notes=(
        "Attention and MLP run side by side on one normalised input; the mixer takes attention's place.",
        "LayerNorm with biases, and biases in every projection.",
        "Only a part of each head is rotated.",
    ),
    model_class="PhiForCausalLM",
    config_class="PhiConfig",
    tiny_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "qk_layernorm": True,
        "tie_word_embeddings": False,
    },
    out_proj="dense",
    qk_norms=("q_layernorm", "k_layernorm"),
    mlx_module="phi",
    mlx_tiny_config={"qk_layernorm": False},
)
