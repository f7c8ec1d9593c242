"""GPT-BigCode: SantaCoder and the first StarCoder."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Cut the one matrix: with one key head its rows lie below the queries, else all three follow in every head."""
    from mohawkify.families.projections import cut_into_heads, interleaved_rows, rows_of

    width, features = attention.head_dim, attention.embed_dim
    if attention.multi_query:
        rows = rows_of(attention.c_attn)
        query, key = rows.between(0, features), rows.between(features, features + width)
        value = rows.between(features + width, features + 2 * width)
    else:
        query, key, value = interleaved_rows(attention.c_attn, (1, 1, 1), width)
    return cut_into_heads(query, key, value, rows_of(attention.c_proj), width, attention.scaling)


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The width of the MLP, which transformers works out where it is not said."""
    return {"n_inner": config["n_inner"] or 4 * config["n_embd"]}


ADAPTER = Adapter(
    model_type="gpt_bigcode",
    title="GPT-BigCode, StarCoder",
    examples=("bigcode/starcoder", "bigcode/gpt_bigcode-santacoder"),
    notes=(
        "One key head for all query heads.",
        "Positions are learned and added to the embedding; the student keeps them.",
        "Decoder layers do not hand positions on; mixers read document borders from the mask.",
    ),
    model_class="GPTBigCodeForCausalLM",
    config_class="GPTBigCodeConfig",
    tiny_config={"multi_query": True, "n_inner": 48},
    layers="transformer.h",
    attention="attn",
    read_weights=read_weights,
    reads_mask=True,
    mlx_module="gpt_bigcode",
    mlx_config=mlx_config,
    mlx_counts_tokens=True,
    mlx_tiny_config={"activation_function": "gelu"},
)
