"""OLMo 3."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="olmo3",
    title="OLMo 3",
    examples=("allenai/Olmo-3-7B-Instruct",),
    notes=(
        "Norms stand after attention and MLP, not before.",
        "Queries and keys are normalised over all heads together.",
        "Three of four layers use a sliding window, with rotary frequencies of their own.",
    ),
    model_class="Olmo3ForCausalLM",
    config_class="Olmo3Config",
    tiny_config={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    qk_norms=("q_norm", "k_norm"),
    mlx_module="olmo3",
)
