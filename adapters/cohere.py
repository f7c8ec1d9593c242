"""Cohere's Command R and Aya."""

from mohawkify.families.adapter import Adapter, Logits

ADAPTER = Adapter(
    model_type="cohere",
    title="Command R",
    examples=("CohereLabs/c4ai-command-r-v01", "CohereLabs/aya-23-8B"),
    notes=(
        "Attention and MLP run side by side on one normalised input.",
        "Logits are multiplied by logit_scale.",
        "Command R+ has a norm for every query and key head.",
    ),
    model_class="CohereForCausalLM",
    config_class="CohereConfig",
    tiny_config={"use_qk_norm": True, "logit_scale": 0.5},
    qk_norms=("q_norm", "k_norm"),
    logits=Logits(multiplier="logit_scale"),
    mlx_module="cohere",
)
