"""Falcon 7B, 40B, 180B and Falcon 2 11B."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def refuse(config: Any) -> str | None:
    """The small Falcon-RW models build ALiBi from a padding mask, which cannot hold document borders."""
    return "it uses ALiBi, which cannot respect document borders" if config.alibi else None


def read_weights(attention: Any) -> AttentionWeights:
    """Cut the one matrix in the way of the model's generation."""
    from mohawkify.families.projections import cut_into_heads, interleaved_rows, rows_of

    width, heads, linear = attention.head_dim, attention.num_heads, attention.query_key_value
    if attention.new_decoder_architecture:
        query, key, value = interleaved_rows(linear, (heads // attention.num_kv_heads, 1, 1), width)
    elif attention.multi_query:
        rows, end = rows_of(linear), heads * width
        query, key, value = rows.between(0, end), rows.between(end, end + width), rows.between(end + width, None)
    else:
        query, key, value = interleaved_rows(linear, (1, 1, 1), width)
    return cut_into_heads(query, key, value, rows_of(attention.dense), width, width**-0.5)


def capture(attention: Any, hidden_bld: Any, arguments: Mapping[str, Any]) -> Any:
    """Rebuild rotated queries and keys as the module does."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    from mohawkify.ops.mixing_matrices import AttentionMatrix

    q_blhp, k_blhp, v_blhp = attention._split_heads(attention.query_key_value(hidden_bld))
    q_bhlp, k_bhlp = apply_rotary_pos_emb(
        q_blhp.transpose(1, 2), k_blhp.transpose(1, 2), *arguments["position_embeddings"]
    )
    return AttentionMatrix(
        q_bhlp, k_bhlp, attention.head_dim**-0.5, arguments["attention_mask"],
        value_norms_bgs=v_blhp.norm(dim=-1).transpose(1, 2),
    )  # fmt: skip


ADAPTER = Adapter(
    model_type="falcon",
    title="Falcon",
    examples=("tiiuae/falcon-7b-instruct", "tiiuae/falcon-40b", "tiiuae/falcon-11B"),
    notes=(
        "One matrix holds queries, keys and values: with one key head, in groups, or head by head.",
        "Attention and MLP run side by side.",
        "Attention does not use transformers' interface; stage 1 rebuilds queries and keys from the module's call.",
        "The model ignores document borders in its positions, so it is handed a mask that has them.",
        "Falcon3 is of the type llama.",
    ),
    model_class="FalconForCausalLM",
    config_class="FalconConfig",
    tiny_config={
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": True,
        "alibi": False,
    },
    layers="transformer.h",
    attention="self_attention",
    read_weights=read_weights,
    capture=capture,
    refuse=refuse,
    packs_by_mask=True,
    reads_mask=True,
)
