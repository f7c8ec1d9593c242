"""Cohere's Command R7B and Command A."""

from mohawkify.families.adapter import Adapter, Logits

ADAPTER = Adapter(
    model_type="cohere2",
    title="Command R7B, Command A",
    examples=("CohereLabs/c4ai-command-r7b-12-2024", "CohereLabs/c4ai-command-a-03-2025"),
    notes=(
        "Three of four layers use a sliding window and rotate, the fourth attends to everything and does not rotate.",
        "Attention and MLP run side by side on one normalised input.",
        "Logits are multiplied by logit_scale.",
    ),
    model_class="Cohere2ForCausalLM",
    config_class="Cohere2Config",
    tiny_config={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.5},
    logits=Logits(multiplier="logit_scale"),
    mlx_module="cohere2",
)
