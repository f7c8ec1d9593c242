"""Detect a family without a file by its modules; an error names the missing parts. No guesses.

The result is verified on the loaded weights before a run trains: see `student.verify`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mohawkify.errors import UnknownFamilyError
from mohawkify.families.adapter import Adapter, Logits
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.families.unsupported import UNSUPPORTED

OUT_NAMES = ("o_proj", "out_proj", "dense")
NORM_NAMES = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
RECURRENT = re.compile(r"Mamba|Rwkv|SSM|Recurrent|LinearAtt|Delta|mLSTM|ShortConv")
NO_FILE = Logits(unknown="no file in adapters/ describes how the head's output becomes logits")
HINT = "docs/adapters.md says how to add a family: one file"


def find_adapter(model_type: str, values: Mapping[str, Any]) -> Adapter:
    """The family's adapter from its file or, without one, from its modules.

    Args:
        model_type: ``model_type`` in the teacher's ``config.json``; untrusted.
        values: the configuration.

    Raises:
        UnknownFamilyError: no file, and the modules are not what a family needs; or the family cannot be converted.
    """
    _refuse_other_kinds(model_type)
    return autodetect(model_type, values) if _has_no_file(model_type) else load_adapter(model_type)


def find_classes(model_type: str) -> Adapter:
    """A family's classes alone: enough to load a student, whose configuration lists its mixers.

    Raises:
        UnknownFamilyError: neither adapters/ nor transformers has such a causal language model.
    """
    if not _has_no_file(model_type):
        return load_adapter(model_type)
    return _classes(model_type)


def autodetect(model_type: str, values: Mapping[str, Any]) -> Adapter:
    """Derive a family's adapter from its modules on the meta device.

    Args:
        model_type: a causal language model of transformers.
        values: its configuration.

    Returns:
        An adapter whose ``notes`` list the detected parts with the evidence.

    Raises:
        UnknownFamilyError: names what is missing.
    """
    classes = _classes(model_type)
    if not classes.model_class.endswith(("ForCausalLM", "LMHeadModel")):
        raise _refusal(model_type, f"its class {classes.model_class} is not a plain causal language model")
    try:
        config = getattr(transformers, classes.config_class)(**values)
        with torch.device("meta"):
            model = getattr(transformers, classes.model_class)(config)
    except Exception as error:
        raise _refusal(model_type, f"its modules cannot be laid out ({' '.join(str(error).split())[:200]})") from error
    num_layers = getattr(config, "num_hidden_layers", None)
    if not num_layers:
        raise _refusal(model_type, "its configuration does not say num_hidden_layers")
    layers = _find_layers(model_type, model, num_layers)
    attention = _find_attention(model_type, model.get_submodule(layers))
    modules = [getattr(layer, attention) for layer in model.get_submodule(layers)]
    out_proj = next(name for name in OUT_NAMES if hasattr(modules[0], name))
    qk_norms = next((pair for pair in NORM_NAMES if any(hasattr(module, pair[0]) for module in modules)), None)
    for index, module in enumerate(modules):
        _require_known_parameters(model_type, index, module, out_proj, qk_norms)
    source = inspect.getsource(type(modules[0]).forward)
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        raise _refusal(model_type, f"{type(modules[0]).__name__} does not attend through transformers' interface")
    norms = f" and the norms {' and '.join(qk_norms)}" if qk_norms else ""
    return replace(
        classes,
        notes=(
            f"No file in adapters/: autodetected from its modules in transformers {transformers.__version__}.",
            f"{layers} holds the {len(modules)} decoder layers: the only list of that length with attention inside.",
            f"{attention} is the attention, {type(modules[0]).__name__}: it has q_proj, k_proj, v_proj,"
            f" {out_proj}{norms}, and no other parameters.",
            "It attends through transformers' attention interface, where stage 1 captures queries and keys.",
            "Norms of queries and keys are not folded into the attention start: how they store weights is unknown.",
            "Stage 3 holds all logits of a micro-batch at once: how they follow from the head's output is unknown.",
            "Before it trains, a run verifies on the loaded weights that attention can be captured, that its output is"
            " its matrix times its values, and that it is causal and stays within documents.",
        ),
        layers=layers,
        attention=attention,
        out_proj=out_proj,
    )


def _has_no_file(model_type: str) -> bool:
    """Whether a type is a causal language model of transformers that has neither a file nor a reason against it."""
    known = model_type in adapter_names() or model_type in UNSUPPORTED
    return not known and model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _classes(model_type: str) -> Adapter:
    """An adapter with the classes that transformers has for a type, and no more."""
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return Adapter(
        model_type=model_type,
        title=model_type,
        examples=(),
        notes=(),
        model_class=name if isinstance(name, str) else name[0],
        config_class=CONFIG_MAPPING_NAMES[model_type],
        logits=NO_FILE,
        autodetected=True,
    )


def _refuse_other_kinds(model_type: str) -> None:
    """Refuse a known type that does not generate text from text alone, and name its kind."""
    if model_type in adapter_names() or model_type in UNSUPPORTED:
        return  # the registry has its own errors for those
    kinds = {
        "it has an encoder and a decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "it reads more than text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "it is an encoder, which sees the future": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    for reason, mapping in kinds.items():
        if model_type in mapping:
            raise UnknownFamilyError(
                f"a teacher of the family {model_type} cannot be converted: {reason}",
                hint="a teacher is a causal language model: a decoder that reads text",
            )


def _refusal(model_type: str, reason: str) -> UnknownFamilyError:
    return UnknownFamilyError(f"the family {model_type} has no file in adapters/, and {reason}", hint=HINT)


def _is_attention(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj"))


def _find_layers(model_type: str, model: nn.Module, num_layers: int) -> str:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    found = [name for name, stack in lists.items() if any(_is_attention(child) for child in stack[0].children())]
    if len(found) == 1:
        return found[0]
    if found:
        raise _refusal(model_type, f"has more than one list of {num_layers} layers with attention: {', '.join(found)}")
    if not lists:
        raise _refusal(model_type, f"no list of {num_layers} layers was found in it")
    first = next(iter(lists.values()))[0]
    _refuse_recurrent(model_type, 0, first)
    children = ", ".join(f"{name} ({_parts(child)})" for name, child in first.named_children() if [*child.children()])
    raise _refusal(model_type, f"no child of its layers has linear q_proj, k_proj and v_proj; found {children}")


def _find_attention(model_type: str, stack: nn.Module) -> str:
    layers = list(stack.children())
    names = [name for name, child in layers[0].named_children() if _is_attention(child)]
    if len(names) != 1:
        raise _refusal(model_type, f"layer 0 has more than one attention: {', '.join(names)}")
    for index, layer in enumerate(layers):
        _refuse_recurrent(model_type, index, layer)
        attention = getattr(layer, names[0], None)
        if not isinstance(attention, nn.Module) or not _is_attention(attention):
            raise _refusal(model_type, f"layer {index} has no {names[0]} with q_proj, k_proj and v_proj")
        if not any(hasattr(attention, name) for name in OUT_NAMES):
            raise _refusal(model_type, f"{names[0]} of layer {index} has no output projection ({', '.join(OUT_NAMES)})")
    return names[0]


def _refuse_recurrent(model_type: str, index: int, layer: nn.Module) -> None:
    names = [type(child).__name__ for child in layer.children()]
    recurrent = [name for name in names if RECURRENT.search(name) and "norm" not in name.lower()]
    if recurrent:
        raise _refusal(model_type, f"layer {index} is recurrent already ({recurrent[0]})")


def _require_known_parameters(
    model_type: str, index: int, attention: nn.Module, out_proj: str, qk_norms: tuple[str, str] | None
) -> None:
    known = {"q_proj", "k_proj", "v_proj", out_proj, *(qk_norms or ())}
    unknown = sorted({name for name, _ in attention.named_parameters() if name.split(".")[0] not in known})
    if unknown:
        raise _refusal(model_type, f"the attention of layer {index} has parameters of unknown meaning: {unknown[0]}")
    for name in qk_norms or ():
        norm = getattr(attention, name, None)
        if norm is not None and {own for own, _ in norm.named_parameters()} not in ({"weight"}, {"weight", "bias"}):
            raise _refusal(model_type, f"{name} of layer {index} is not a norm with one weight")


def _parts(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or type(module).__name__
