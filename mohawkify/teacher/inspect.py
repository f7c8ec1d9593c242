"""Read what a teacher is from its configuration; its modules are laid out on the meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mohawkify.adapter import Adapter
from mohawkify.errors import TeacherError
from mohawkify.shelf import load_adapter
from mohawkify.spec import TeacherSpec
from mohawkify.storage import read_json
from mohawkify.student.grafting import find_layers
from mohawkify.teacher.locate import find_config

REFUSED_KEYS = ("auto_map", "_attn_implementation_internal", "_attn_implementation", "attn_implementation")


@dataclass(frozen=True)
class Inspection:
    """A teacher's facts, its configuration, its family, and its modules on the meta device."""

    spec: TeacherSpec
    config: transformers.PretrainedConfig
    adapter: Adapter
    modules: nn.Module


def inspect_teacher(source: str) -> Inspection:
    """Inspect a teacher without loading weights.

    Args:
        source: a Hub id, a folder or a config.json.

    Raises:
        TeacherError: no such teacher, a broken configuration, or an unknown family.
    """
    path = find_config(source)
    config, adapter = read_config(path)
    with torch.device("meta"):
        modules = getattr(transformers, adapter.model_class)(config)
    return Inspection(_facts(source, config, adapter, modules), config, adapter, modules)


def read_config(path: Path) -> tuple[transformers.PretrainedConfig, Adapter]:
    """Read a config.json with its family's own configuration class; keys that would run code are dropped."""
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise TeacherError(f"{path} has no model_type", hint="expected the config.json of a transformers model")
    if raw["model_type"].startswith("mohawk_"):
        raise TeacherError(f"{path} is already a student of mohawkify (model_type {raw['model_type']})")
    adapter = load_adapter(raw["model_type"])
    values = {key: value for key, value in raw.items() if key not in REFUSED_KEYS}
    try:
        config = getattr(transformers, adapter.config_class)(**values)
    except Exception as error:
        first = " ".join(str(error).split())
        raise TeacherError(f"{path} is not a valid {adapter.model_type} configuration: {first}") from error
    return config, adapter


def _facts(source: str, config: Any, adapter: Adapter, modules: Any) -> TeacherSpec:
    layers = find_layers(modules, adapter.layers)
    attentions: list[nn.Module] = [getattr(layer, adapter.attention) for layer in layers]
    biases = sorted(
        {name.removesuffix(".bias") for name, _ in attentions[0].named_parameters() if name.endswith(".bias")}
    )
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    return TeacherSpec(
        source=source,
        model_type=adapter.model_type,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=head_width,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied=head is not None and head.weight is embedding.weight,
        num_parameters=sum(p.numel() for p in modules.parameters()),
        attention_parameters=sum(p.numel() for attention in attentions for p in attention.parameters()),
        attention_biases=tuple(biases),
        layer_types=tuple(getattr(config, "layer_types", None) or ["full_attention"] * len(layers)),
        sliding_window=getattr(config, "sliding_window", None),
    )
