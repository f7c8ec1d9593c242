"""Gemma 3 models that read text only."""

from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights, Logits


def read_weights(attention: Any) -> AttentionWeights:
    """Fold in the weights of the query and key norms, which are stored less 1."""
    from mohawkify.families.projections import fold_scales, read_projections

    return fold_scales(read_projections(attention), 1.0 + attention.q_norm.weight, 1.0 + attention.k_norm.weight)


ADAPTER = Adapter(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    examples=("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
    notes=(
        "Queries and keys are normalised per head, by weights that are stored less 1.",
        "Layers with a sliding window rotate by other frequencies than the full ones.",
        "Norms before and after attention and MLP.",
    ),
    model_class="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    tiny_config={
        "head_dim": 12,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 7,
    },
    read_weights=read_weights,
    logits=Logits(softcap="final_logit_softcapping"),
    mlx_module="gemma3_text",
    mlx_tiny_config={"hidden_size": 64},
)
