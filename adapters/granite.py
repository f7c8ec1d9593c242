"""IBM Granite 3 dense models."""

from mohawkify.families.adapter import Adapter, Logits

ADAPTER = Adapter(
    model_type="granite",
    title="Granite",
    examples=("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
    notes=(
        "Products are scaled by attention_multiplier; stage 1 captures the scale, the attention start takes it.",
        "Embeddings, residuals and logits have multipliers of their own; they stay the teacher's.",
    ),
    model_class="GraniteForCausalLM",
    config_class="GraniteConfig",
    tiny_config={
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    logits=Logits(divisor="logits_scaling"),
    mlx_module="granite",
    mamba2="hybrids",
)
