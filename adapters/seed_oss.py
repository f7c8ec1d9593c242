"""ByteDance's Seed-OSS."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="seed_oss",
    title="Seed-OSS",
    examples=("ByteDance-Seed/Seed-OSS-36B-Instruct",),
    notes=("Queries, keys and values have biases, the output projection need not.",),
    model_class="SeedOssForCausalLM",
    config_class="SeedOssConfig",
    tiny_config={"head_dim": 12, "attention_bias": True, "attention_out_bias": False},
    mlx_module="seed_oss",
    mamba2="hybrids",
)
