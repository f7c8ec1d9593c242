"""GPT-NeoX and the Pythia suite."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter, AttentionWeights


def read_weights(attention: Any) -> AttentionWeights:
    """Take queries, keys and values out of the one matrix, where they follow each other within every head."""
    from mohawkify.families.projections import cut_into_heads, interleaved_rows, rows_of

    width = attention.head_size
    query, key, value = interleaved_rows(attention.query_key_value, (1, 1, 1), width)
    return cut_into_heads(query, key, value, rows_of(attention.dense), width, attention.scaling)


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older names of the rotation."""
    return {"rotary_emb_base": config["rope_theta"], "rotary_pct": config["partial_rotary_factor"]}


ADAPTER = Adapter(
    model_type="gpt_neox",
    title="GPT-NeoX, Pythia",
    examples=("EleutherAI/pythia-410m", "EleutherAI/pythia-6.9b-deduped", "EleutherAI/gpt-neox-20b"),
    notes=(
        "One matrix holds queries, keys and values head by head.",
        "Attention and MLP run side by side, each behind its own LayerNorm.",
        "Only a part of each head is rotated.",
        "Biases in every projection.",
    ),
    model_class="GPTNeoXForCausalLM",
    config_class="GPTNeoXConfig",
    tiny_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    layers="gpt_neox.layers",
    attention="attention",
    read_weights=read_weights,
    mlx_module="gpt_neox",
    mlx_config=mlx_config,
    mlx_tiny_config={"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 128},
)
