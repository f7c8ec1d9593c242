"""IBM Granite 3 mixtures of experts."""

from mohawkify.families.adapter import Adapter, Logits

ADAPTER = Adapter(
    model_type="granitemoe",
    title="Granite MoE",
    examples=("ibm-granite/granite-3.1-1b-a400m-instruct", "ibm-granite/granite-3.1-3b-a800m-instruct"),
    notes=(
        "Experts and their router are copied.",
        "Products, embeddings, residuals and logits have multipliers, as in Granite.",
    ),
    model_class="GraniteMoeForCausalLM",
    config_class="GraniteMoeConfig",
    tiny_config={
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    logits=Logits(divisor="logits_scaling"),
    mlx_module="granitemoe",
)
