"""Arcee's foundation models."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="arcee",
    title="Arcee",
    examples=("arcee-ai/AFM-4.5B",),
    notes=("An MLP with squared ReLU and no gate.",),
    model_class="ArceeForCausalLM",
    config_class="ArceeConfig",
    tiny_config={"head_dim": 12},
)
