"""StableLM 3B and StableLM 2."""

from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Fold in the weights of the norms, of which every head has its own."""
    import torch

    from mohawkify.families.projections import fold_scales, read_projections

    weights = read_projections(attention)
    if not attention.qk_layernorm:
        return weights
    q_scale, k_scale = (
        torch.stack([norm.weight for norm in norms.norms]) for norms in (attention.q_layernorm, attention.k_layernorm)
    )
    return fold_scales(weights, q_scale, k_scale)


ADAPTER = Adapter(
    model_type="stablelm",
    title="StableLM",
    examples=("stabilityai/stablelm-2-1_6b", "stabilityai/stablelm-3b-4e1t", "stabilityai/stablelm-2-12b-chat"),
    notes=(
        "Only a part of each head is rotated.",
        "The 12B model runs attention and MLP side by side and has a LayerNorm for every query and key head.",
        "Decoder layers do not hand padding on; mixers read it from the mask.",
    ),
    model_class="StableLmForCausalLM",
    config_class="StableLmConfig",
    tiny_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
    },
    read_weights=read_weights,
    reads_mask=True,
    mlx_module="stablelm",
)
