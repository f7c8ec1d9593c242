"""Read what a teacher is from its configuration; its modules are laid out on the meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mohawkify.errors import TeacherError
from mohawkify.families.adapter import Adapter, AttentionWeights
from mohawkify.families.autodetect import find_adapter
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.teacher.locate import find_config
from mohawkify.teacher.teacher_spec import TeacherSpec
from mohawkify.teacher.validate import require_config, require_settings, require_token_ids, without_code

LENGTH_KEYS = ("max_position_embeddings", "max_seq_len")  # the longest sequence, by whichever name
CHOSEN_KEYS = ("num_experts_per_tok", "moe_topk")  # the experts of one token, by whichever name
# Not architecture: what transformers would hand back beside the results, which nobody here reads.
UNUSED_KEYS = ("output_attentions", "output_hidden_states")


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
    try:
        with torch.device("meta"):
            modules = getattr(transformers, adapter.model_class)(config)
        spec = _facts(source, config, adapter, modules)
    except TeacherError:
        raise
    except Exception as error:  # sizes that do not fit each other fail in whatever way the family's modules do
        raise TeacherError(
            f"no {adapter.title} model can be laid out from {path}: {type(error).__name__}: {_one_line(error)}",
            hint="the sizes in config.json do not fit each other: fetch the file again",
        ) from error
    return Inspection(spec, config, adapter, modules)


def read_config(path: Path) -> tuple[transformers.PretrainedConfig, Adapter]:
    """Read a config.json with its family's own configuration class; keys that would run code are dropped.

    Raises:
        TeacherError: a broken configuration, sizes that no model has, keys that are no settings, tokens that the
            vocabulary does not have, or an unknown family.
        CheckpointError: not strict JSON.
    """
    raw = require_config(path)
    if not isinstance(raw.get("model_type"), str):
        raise TeacherError(f"{path} has no model_type", hint="expected the config.json of a transformers model")
    if raw["model_type"].startswith("mohawk_"):
        raise TeacherError(f"{path} is already a student of mohawkify (model_type {raw['model_type'][:100]})")
    values = {key: value for key, value in without_code(raw).items() if key not in UNUSED_KEYS}
    adapter = find_adapter(raw["model_type"], values)
    require_settings(path, values, getattr(transformers, adapter.config_class))
    try:
        config = getattr(transformers, adapter.config_class)(**values)
        reason = adapter.refuse(config) if adapter.refuse else None
    except Exception as error:
        raise TeacherError(f"{path} is not a valid {adapter.model_type} configuration: {_one_line(error)}") from error
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):
        reason = "its attention sees the future"
    require_token_ids(path, config)
    if reason:
        raise TeacherError(f"the {adapter.title} model of {path} cannot be converted: {reason}")
    return config, adapter


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _facts(source: str, config: Any, adapter: Adapter, modules: Any) -> TeacherSpec:
    layers = find_layers(modules, adapter.layers)
    attentions: list[nn.Module] = [getattr(layer, adapter.attention) for layer in layers]
    weights = [read_attention(adapter, attention) for attention in attentions]
    _require_alike(adapter, weights)
    num_heads, head_dim, hidden_size = weights[0].q_hpd.shape
    embedding, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    biases = {
        "query": weights[0].q_bias_hp,
        "key": weights[0].k_bias_gp,
        "value": weights[0].v_bias_gp,
        "out": weights[0].out_bias_d,
    }
    num_parameters = sum(p.numel() for p in modules.parameters())
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(layers)
    return TeacherSpec(
        source=source,
        model_type=adapter.model_type,
        num_hidden_layers=len(layers),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=weights[0].k_gpd.shape[0],
        head_dim=head_dim,
        vocab_size=embedding.weight.shape[0],
        max_position_embeddings=next(getattr(config, key) for key in LENGTH_KEYS if getattr(config, key, None)),
        tie_word_embeddings=head is not None and head.weight is embedding.weight,
        num_parameters=num_parameters,
        active_parameters=num_parameters - _idle_parameters(config, modules),
        embedding_parameters=sum(p.numel() for p in embedding_tables(modules)),
        head_parameters=0 if head is None else sum(p.numel() for p in head.parameters()),
        attention_parameters=sum(p.numel() for attention in attentions for p in attention.parameters()),
        attention_biases=tuple(name for name, bias in biases.items() if bias is not None),
        layer_types=tuple(kinds),
        sliding_window=window if "sliding_attention" in kinds else None,
    )


def embedding_tables(modules: nn.Module) -> list[nn.Parameter]:
    """The tables that a model looks tokens and learned positions up in."""
    return [p for module in modules.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]


def _idle_parameters(config: Any, modules: nn.Module) -> int:
    """Experts lie side by side in tensors of three axes, the first their number; a token leaves most of them idle."""
    chosen = next((getattr(config, key) for key in CHOSEN_KEYS if isinstance(getattr(config, key, None), int)), None)
    idle = 0
    for module in modules.modules():
        experts = getattr(module, "num_experts", None)
        for parameter in module.parameters(recurse=False):
            if chosen and parameter.dim() == 3 and parameter.shape[0] == experts:
                idle += parameter[chosen:].numel()
    return idle


def _require_alike(adapter: Adapter, weights: list[AttentionWeights]) -> None:
    """Mixers of all layers have the same sizes, so their attention modules must."""
    shapes = [(tuple(each.q_hpd.shape), tuple(each.k_gpd.shape), tuple(each.v_gpd.shape)) for each in weights]
    q_shape, k_shape, v_shape = shapes[0]
    if q_shape[1:] != k_shape[1:] or k_shape != v_shape:
        raise TeacherError(
            f"the {adapter.title} teacher's queries, keys and values differ in width: {q_shape}, {k_shape}, {v_shape}"
        )
    odd = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise TeacherError(
            f"layer {odd} of the {adapter.title} teacher has attention of other sizes than layer 0:"
            f" queries {shapes[odd][0]}, expected {q_shape}",
        )
