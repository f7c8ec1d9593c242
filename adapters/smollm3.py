"""SmolLM3."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="smollm3",
    title="SmolLM3",
    examples=("HuggingFaceTB/SmolLM3-3B",),
    notes=("Every fourth layer does not rotate queries and keys.",),
    model_class="SmolLM3ForCausalLM",
    config_class="SmolLM3Config",
    tiny_config={"no_rope_layers": [1, 0]},
    mlx_module="smollm3",
    mamba2="hybrids",
)
