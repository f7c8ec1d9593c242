"""Gemma 2."""

from mohawkify.families.adapter import Adapter, Logits

ADAPTER = Adapter(
    model_type="gemma2",
    title="Gemma 2",
    examples=("google/gemma-2-2b-it", "google/gemma-2-9b-it"),
    notes=(
        "Scores and logits pass through a soft cap; stage 1 applies the cap, the head keeps its own.",
        "Layers alternate between a sliding window and full attention.",
        "Norms before and after attention and MLP.",
        "Products are scaled by query_pre_attn_scalar, not by the head dimension.",
    ),
    model_class="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    tiny_config={
        "head_dim": 12,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    logits=Logits(softcap="final_logit_softcapping"),
    mlx_module="gemma2",
)
