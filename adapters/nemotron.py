"""NVIDIA's Nemotron-4 and Minitron."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="nemotron",
    title="Nemotron, Minitron",
    examples=("nvidia/Minitron-4B-Base", "nvidia/Nemotron-4-Mini-Hindi-4B-Instruct"),
    notes=(
        "LayerNorm whose weights are stored less 1, and an MLP with squared ReLU.",
        "Only a part of each head is rotated.",
        "Decoder layers do not hand padding on; mixers read it from the mask.",
    ),
    model_class="NemotronForCausalLM",
    config_class="NemotronConfig",
    tiny_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "head_dim": 12,
    },
    reads_mask=True,
    mlx_module="nemotron",
)
