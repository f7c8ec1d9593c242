"""Phi-3, Phi-3.5 and Phi-4 dense models."""

from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Cut the one matrix into queries, keys and values."""
    from mohawkify.families.projections import cut_into_heads, rows_of

    rows, out, width = rows_of(attention.qkv_proj), attention.o_proj, attention.head_dim
    queries, keys = out.in_features, attention.num_key_value_heads * width
    return cut_into_heads(
        rows.between(0, queries),
        rows.between(queries, queries + keys),
        rows.between(queries + keys, queries + 2 * keys),
        rows_of(out),
        width,
        attention.scaling,
    )


ADAPTER = Adapter(
    model_type="phi3",
    title="Phi-3, Phi-4",
    examples=("microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4", "microsoft/Phi-4-mini-instruct"),
    notes=(
        "Queries, keys and values lie in one matrix, one below the other; gate and up projection in another.",
        "Phi-3 mini uses a sliding window, longer ones stretch their rotary frequencies.",
    ),
    model_class="Phi3ForCausalLM",
    config_class="Phi3Config",
    tiny_config={"sliding_window": 5},
    read_weights=read_weights,
    mlx_module="phi3",
    mlx_tiny_config={"sliding_window": None},
    mamba2="layers",
)
