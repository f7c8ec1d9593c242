"""OLMo 1."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="olmo",
    title="OLMo",
    examples=("allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf"),
    notes=(
        "Norms without weights.",
        "Queries, keys and values may be clipped; the attention start ignores that, stage 1 captures it.",
    ),
    model_class="OlmoForCausalLM",
    config_class="OlmoConfig",
    tiny_config={"clip_qkv": 0.4},
)
