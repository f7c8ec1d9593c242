"""Where a model's decoder layers are, and how it attends. Travels with exported students."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The decoder layers at an attribute path such as ``model.layers``."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def attention_implementation(model_class: Any, config: Any) -> str:
    """The attention implementation that every machine has: fused where the family can, else its own plain one.

    Fused attention has no soft cap on its scores. Before 5.21, transformers offers it to Gemma 2 all the same, and
    drops the cap silently.

    Args:
        model_class: a causal language model class of transformers.
        config: the model's configuration.
    """
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not is_capped else "eager"
