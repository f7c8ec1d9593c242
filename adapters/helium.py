"""Kyutai's Helium."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="helium",
    title="Helium",
    examples=("kyutai/helium-1-2b",),
    notes=("Neighbouring features of a head are rotated together.",),
    model_class="HeliumForCausalLM",
    config_class="HeliumConfig",
    tiny_config={"head_dim": 8, "attention_bias": False},
    mlx_module="helium",
    mamba2="layers",
)
