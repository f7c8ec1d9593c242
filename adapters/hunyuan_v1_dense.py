"""Tencent's Hunyuan dense models."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="hunyuan_v1_dense",
    title="Hunyuan",
    examples=("tencent/Hunyuan-1.8B-Instruct", "tencent/Hunyuan-7B-Instruct"),
    notes=("Queries and keys are normalised per head, after they are rotated.",),
    model_class="HunYuanDenseV1ForCausalLM",
    config_class="HunYuanDenseV1Config",
    tiny_config={"head_dim": 12},
    qk_norms=("query_layernorm", "key_layernorm"),
    mlx_module="hunyuan_v1_dense",
    mamba2="layers",
)
