"""GPT-2 and models trained like it."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Transpose, and cut the one matrix into queries, keys and values."""
    from mohawkify.families.projections import Rows, cut_into_heads

    rows, features = Rows(attention.c_attn.weight.T, attention.c_attn.bias), attention.embed_dim
    query, key, value = (rows.between(part * features, (part + 1) * features) for part in range(3))
    out = Rows(attention.c_proj.weight.T, attention.c_proj.bias)
    return cut_into_heads(query, key, value, out, attention.head_dim, attention.scaling)


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older name of the longest sequence."""
    return {"n_ctx": config["n_positions"]}


ADAPTER = Adapter(
    model_type="gpt2",
    title="GPT-2",
    examples=("openai-community/gpt2", "openai-community/gpt2-xl", "distilbert/distilgpt2"),
    notes=(
        "Positions are learned and added to the embedding; the student keeps them.",
        "Projections are stored transposed, queries, keys and values in one.",
        "Some checkpoints scale attention by the layer's number too; stage 1 captures the scale.",
    ),
    model_class="GPT2LMHeadModel",
    config_class="GPT2Config",
    tiny_config={"scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
    layers="transformer.h",
    attention="attn",
    read_weights=read_weights,
    mlx_module="gpt2",
    mlx_config=mlx_config,
    mlx_prefix="transformer.",
    mlx_counts_tokens=True,
    mlx_tiny_config={"scale_attn_by_inverse_layer_idx": False, "n_inner": None},
)
