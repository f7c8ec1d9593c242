"""The settings of a GGUF file's model, from the metadata of the file, as transformers names them. No torch here.

Every key of the architecture must reach a setting or agree with one: what nobody reads would make another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mohawkify.errors import TeacherError, quoted
from mohawkify.teacher.gguf_header import GgufFile, damaged

ROPE_FACTORS = "rope_freqs.weight"  # beside the model's tensors: by what each rotary frequency is divided

_OTHERWISE = "use the model's Hugging Face folder or Hub id"
# What llama.cpp supplies where a file is silent; all other keys of transformers' table must be there.
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base", "vocab_size")
_KEY_WIDTH = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _no_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """An architecture of ggml, read here because a test compares it with transformers' own model.

    Args:
        model_type: transformers' key of the family.
        more: keys that transformers' table lacks, and the settings that they become.
        derived: further settings, from those that the file gives.
    """

    model_type: str
    more: Mapping[str, str]
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_settings


def _attention_scale(layers: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Gemma's models of so many layers, the 27B, divide queries by another number than the root of the head's width.

    No key says so; llama.cpp goes by the number of layers too.
    """

    def derive(values: Mapping[str, Any]) -> dict[str, Any]:
        is_largest = values["num_hidden_layers"] == layers
        by_width = values["hidden_size"] // values["num_attention_heads"]
        return {"query_pre_attn_scalar": by_width if is_largest else values["head_dim"]}

    return derive


_SOFT_CAPS = {f"{name}_softcapping": f"{name}_softcapping" for name in ("attn_logit", "final_logit")}
ARCHITECTURES = {
    "llama": Architecture("llama", {}),
    "qwen2": Architecture("qwen2", {}),
    "qwen3": Architecture("qwen3", _KEY_WIDTH),
    "phi3": Architecture("phi3", _WINDOW),
    "gemma2": Architecture("gemma2", {**_KEY_WIDTH, **_SOFT_CAPS}, _attention_scale(46)),
    "gemma3": Architecture("gemma3_text", {**_KEY_WIDTH, **_SOFT_CAPS}, _attention_scale(62)),
}


def read_settings(file: GgufFile) -> dict[str, Any]:
    """What config.json would hold, of a file with `require_tokens`.

    Raises:
        TeacherError: an architecture that is not read; a key that is missing, or that is no single number.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise TeacherError(
            f"{file.path} holds a model of the architecture {str(name)[:40]!r}, expected {', '.join(ARCHITECTURES)}",
            hint=_OTHERWISE,
        )
    found, architecture = _keys(file, name), ARCHITECTURES[name]
    settings = _table(name)
    for key in sorted(settings.keys() - found.keys() - set(_OPTIONAL)):
        raise TeacherError(f"{file.path} lacks {name}.{key}", hint=_OTHERWISE)
    settings |= architecture.more
    values = {settings[key]: value for key, value in found.items() if key in settings}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    num_tokens = len(file.metadata["tokenizer.ggml.tokens"])
    if num_tokens > values.setdefault("vocab_size", num_tokens):
        raise damaged(file.path, f"it lists {num_tokens:,} tokens, but its vocab_size is {values['vocab_size']}")
    values.setdefault("rope_theta", 10_000.0)
    if "head_dim" in settings.values() and _is_count(values["num_attention_heads"]):
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    for ours, theirs in _SPECIAL_TOKENS.items():  # None too: a family's own default is of another vocabulary
        values[f"{ours}_token_id"] = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    if ROPE_FACTORS in file.tensors:
        values["rope_parameters"] = _llama3_scaling(file, values)
    return {"model_type": architecture.model_type, "dtype": "float32", **values, **architecture.derived(values)}


def generation_settings(file: GgufFile) -> dict[str, Any]:
    """What generation_config.json would hold: the special tokens, with all that end a text or a turn."""
    ids = {key: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    found = {"bos_token_id": ids["bos"], "eos_token_id": ends or None, "pad_token_id": ids["padding"]}
    return {key: value for key, value in found.items() if value is not None}


def require_all_read(file: GgufFile, config: Any) -> None:
    """Refuse a file that says more of its model than the configuration made from it.

    Args:
        file: the GGUF file.
        config: transformers' configuration, from `read_settings`.

    Raises:
        TeacherError: names the first key that became no setting.
    """
    name = file.metadata["general.architecture"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = head_dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    agrees = {
        **dict.fromkeys(("attention.key_length", "attention.value_length"), head_dim),
        "rope.dimension_count": rotary,
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": config.max_position_embeddings,
        **dict.fromkeys(("expert_count", "expert_used_count"), 0),
    }
    read = _table(name).keys() | ARCHITECTURES[name].more.keys()
    for key, value in _keys(file, name).items():
        if key not in read and (key not in agrees or value != agrees[key]):
            raise TeacherError(
                f"{file.path} says {name}.{key} is {str(value)[:40]}, which transformers does not read from GGUF files",
                hint=_OTHERWISE,
            )


def _table(name: str) -> dict[str, str]:
    """The keys of an architecture that transformers reads, and the settings that they become."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    table: Any = GGUF_CONFIG_MAPPING
    return {key: setting for key, setting in table[name].items() if setting}


def _keys(file: GgufFile, name: str) -> dict[str, Any]:
    """The keys of the architecture, without its name."""
    found = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    for key, value in found.items():
        if isinstance(value, list) or (isinstance(value, float) and not math.isfinite(value)):
            shown = "a list" if isinstance(value, list) else value
            raise TeacherError(f"{file.path} says {quoted(name)[1:-1]}.{key} is {shown}", hint=_OTHERWISE)
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _llama3_scaling(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling of rotary frequencies, of which a file has only the result; recomputed to be sure.

    Raises:
        TeacherError: the factors are another scaling's.
    """
    tensor, config = file.tensors[ROPE_FACTORS], {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    half = values["head_dim"] // 2 if _is_count(values.get("head_dim")) else 0
    if tensor.kind == "F32" and tensor.shape == (half,) and half:
        factors = np.memmap(file.path, dtype="<f4", mode="r", offset=tensor.begin, shape=tensor.shape)
        factor, length = round(float(factors.max()), 3), 8192
        turns = length * values["rope_theta"] ** -(np.arange(half) / half) / (2 * math.pi)
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "rope_theta": values["rope_theta"],
                "factor": factor,
                "original_max_position_embeddings": length,
                **config,
            }
    raise TeacherError(f"{file.path} holds {ROPE_FACTORS}, which are not the factors of Llama 3.1", hint=_OTHERWISE)
