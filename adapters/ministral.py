"""Ministral 8B."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="ministral",
    title="Ministral",
    examples=("mistralai/Ministral-8B-Instruct-2410",),
    notes=("Layers alternate between a sliding window and full attention; stage 1 takes each layer's own mask.",),
    model_class="MinistralForCausalLM",
    config_class="MinistralConfig",
    tiny_config={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 12},
    mlx_module="llama",
    mamba2="hybrids",
)
