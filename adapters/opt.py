"""Meta's OPT."""

from mohawkify.families.adapter import Adapter

ADAPTER = Adapter(
    model_type="opt",
    title="OPT",
    examples=("facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-6.7b"),
    notes=(
        "Positions are learned and added to the embedding; the student keeps them.",
        "Biases in every projection.",
        "The model ignores document borders in its positions, so it is handed a mask that has them.",
    ),
    model_class="OPTForCausalLM",
    config_class="OPTConfig",
    tiny_config={"ffn_dim": 48, "word_embed_proj_dim": 32},
    layers="model.decoder.layers",
    out_proj="out_proj",
    packs_by_mask=True,
)
