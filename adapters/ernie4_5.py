"""Baidu's ERNIE 4.5 dense models."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="ernie4_5",
    title="ERNIE 4.5",
    examples=("baidu/ERNIE-4.5-0.3B-PT",),
    notes=("Neighbouring features of a head are rotated together.",),
    model_class="Ernie4_5ForCausalLM",
    config_class="Ernie4_5Config",
    tiny_config={"head_dim": 12, "use_bias": True},
    mlx_module="ernie4_5",
    mamba2="layers",
)
