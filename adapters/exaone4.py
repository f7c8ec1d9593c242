"""LG's EXAONE 4."""

from collections.abc import Mapping
from typing import Any

from mohawkify.families.adapter import Adapter


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers with a window, as a string."""
    letters = ["L" if kind == "sliding_attention" else "G" for kind in config["layer_types"]]
    return {"sliding_window_pattern": "".join(letters) if "L" in letters else None}


ADAPTER = Adapter(
    model_type="exaone4",
    title="EXAONE 4",
    examples=("LGAI-EXAONE/EXAONE-4.0-1.2B", "LGAI-EXAONE/EXAONE-4.0-32B"),
    notes=(
        "Norms stand after attention and MLP.",
        "Queries and keys are normalised per head.",
        "The 32B model mixes sliding windows with full layers that do not rotate.",
    ),
    model_class="Exaone4ForCausalLM",
    config_class="Exaone4Config",
    tiny_config={
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window_pattern": 2,
    },
    qk_norms=("q_norm", "k_norm"),
    mlx_module="exaone4",
    mlx_config=mlx_config,
)
