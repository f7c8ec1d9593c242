"""Lay a teacher's modules out on the meta device, without weights, and read its facts from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mohawkify.errors import TeacherError
from mohawkify.families.adapter import Adapter, AttentionWeights
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.positions import declared_length, longest_sequence
from mohawkify.families.projections import read_attention
from mohawkify.teacher.teacher_spec import TeacherSpec

CHOSEN_KEYS = ("num_experts_per_tok", "moe_topk")  # the experts of one token


def lay_out(
    source: str, path: Path, config: transformers.PretrainedConfig, adapter: Adapter
) -> tuple[nn.Module, TeacherSpec]:
    """Build a teacher's modules on the meta device.

    Args:
        source: the teacher as the user gave it.
        path: its config.json, for messages.
        config: its configuration.
        adapter: its family.

    Raises:
        TeacherError: sizes that do not fit each other, or attention that differs between layers.
    """
    try:
        with torch.device("meta"):
            modules = getattr(transformers, adapter.model_class)(config)
        return modules, _read_spec(source, config, adapter, modules)
    except TeacherError:
        raise
    except Exception as error:  # sizes that do not fit each other fail in whatever way the family's modules do
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"no {adapter.title} model can be laid out from {path}: {type(error).__name__}: {reason}",
            hint="the sizes in config.json do not fit each other: fetch the file again",
        ) from error


def _read_spec(source: str, config: Any, adapter: Adapter, modules: Any) -> TeacherSpec:
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
        max_position_embeddings=declared_length(config),
        longest_sequence=longest_sequence(modules),
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
    """The embedding tables of tokens and learned positions."""
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
