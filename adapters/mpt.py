"""MosaicML's MPT."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Cut the one matrix into queries, keys and values."""
    from mohawkify.families.projections import cut_into_heads, rows_of

    rows, features = rows_of(attention.Wqkv), attention.hidden_size
    query, key, value = (rows.between(part * features, (part + 1) * features) for part in range(3))
    out = rows_of(attention.out_proj)
    return cut_into_heads(query, key, value, out, attention.head_dim, attention.softmax_scale)


def capture(attention: Any, hidden_bld: Any, arguments: Mapping[str, Any]) -> Any:
    """Rebuild queries and keys as the module does; its mask is true where attention is not allowed."""
    from mohawkify.ops.mixing_matrices import AttentionMatrix

    qkv_blf = attention.Wqkv(hidden_bld)
    if attention.clip_qkv:
        qkv_blf = qkv_blf.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    q_bhlp, k_bhlp, v_bhlp = (
        part.unflatten(-1, (attention.n_heads, attention.head_dim)).transpose(1, 2) for part in qkv_blf.chunk(3, dim=-1)
    )
    length = hidden_bld.shape[1]
    bias_hls = arguments["position_bias"][:, -length:, -length:]
    return AttentionMatrix(
        q_bhlp, k_bhlp, attention.softmax_scale, ~arguments["attention_mask"], bias_bhls=bias_hls.unsqueeze(0),
        value_norms_bgs=v_bhlp.norm(dim=-1),
    )  # fmt: skip


ADAPTER = Adapter(
    model_type="mpt",
    title="MPT",
    examples=("mosaicml/mpt-7b", "mosaicml/mpt-7b-instruct"),
    notes=(
        "No positions but ALiBi: a bias on the products that grows with the distance; stage 1 captures it.",
        "One matrix holds queries, keys and values, which may be clipped.",
        "Attention does not use transformers' interface; stage 1 rebuilds its matrix from the module's call.",
        "The model ignores document borders in its positions, so it is handed a mask that has them.",
    ),
    model_class="MptForCausalLM",
    config_class="MptConfig",
    tiny_config={
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": 128,
        "attn_config": {"clip_qkv": 0.9},
    },
    layers="transformer.blocks",
    attention="attn",
    read_weights=read_weights,
    capture=capture,
    packs_by_mask=True,
    reads_mask=True,
)
