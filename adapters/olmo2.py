"""OLMo 2."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="olmo2",
    title="OLMo 2",
    examples=("allenai/OLMo-2-0425-1B-Instruct", "allenai/OLMo-2-1124-7B-Instruct"),
    notes=(
        "Norms stand after attention and MLP, not before.",
        "Queries and keys are normalised over all heads together.",
    ),
    model_class="Olmo2ForCausalLM",
    config_class="Olmo2Config",
    qk_norms=("q_norm", "k_norm"),
    mlx_module="olmo2",
)
