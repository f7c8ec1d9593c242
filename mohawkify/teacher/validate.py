"""Compares the contents of a teacher's files with each other, before a library reads them. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawkify.errors import TeacherError
from mohawkify.files.atomic import read_json
from mohawkify.files.safetensors_headers import (
    FLOAT_BYTES,
    INTEGER_BYTES,
    TensorHeader,
    read_json_object,
    refuse_pointer,
    same_numbers,
)

# Keys that make transformers run code of the folder or, where its package `kernels` is installed, of the Hub.
_CODE_KEYS = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?")

_LONGEST_CONFIG = 10_000_000

# Masks and tables that a family computes when it is loaded may take this many bytes, and this many times the weights.
# Assumed: GPT-2's square mask in every layer, the largest known, is far below at its published length.
_COMPUTED_BYTES = 1 << 30
_COMPUTED_SHARE = 4

# Far above every published model, far below what takes minutes to lay out or overflows a count of elements.
_MOST = (
    (re.compile(r"vocab"), 2**24),
    (re.compile(r"position|seq|length|window|ctx"), 2**31 - 1),
    (re.compile(r"(layer|block|cycle|codebook|num_input)s?$|layers_per|num_labels"), 500),  # a module for each
    (re.compile(r"(head|expert|group|mult|count|type)s?$"), 1024),  # some families lay out a module for each
    (re.compile(r"size|dim|width|head|embd|inner|ffn|expert|rank|group|kernel|channel|state"), 2**20),
)
_AT_LEAST_ONE = re.compile(
    r"(n|num)_(hidden_layers|layers?|heads?|attention_heads|key_value_heads|positions|embd)"
    r"|hidden_size|vocab_size|intermediate_size|head_dim|max_position_embeddings"
)
# Weights that no parameter of the model can hold, or that lie elsewhere than in the files that are checked here.
_UNREAD_KEYS = ("quantization_config", "compression_config", "transformers_weights")


def require_config(path: Path) -> dict[str, Any]:
    """Refuse a config.json that is none, or whose sizes no model has: laying it out could take all time and memory.

    Returns:
        Its content.

    Raises:
        TeacherError: not a file of JSON, too long, a size beyond every published model's, or other files to read.
        CheckpointError: not strict JSON.
    """
    if not path.is_file():
        raise TeacherError(f"{path} is no file", hint="expected the config.json of a transformers model")
    refuse_pointer(path)
    if path.stat().st_size > _LONGEST_CONFIG:
        raise TeacherError(f"{path} has {path.stat().st_size:,} bytes, expected a configuration of a few thousand")
    config = read_json(path)
    if not isinstance(config, dict):
        raise TeacherError(
            f"{path} holds a {type(config).__name__}, expected a JSON object",
            hint="expected the config.json of a transformers model",
        )
    _require_sizes(path, config, depth=0)
    if config.get("configuration_files"):
        raise TeacherError(
            f"{path} names other files as configuration_files, expected the configuration itself",
            hint="remove the key configuration_files",
        )
    return config


def without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration without those that name code to run, at any depth."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not _CODE_KEYS.fullmatch(key)
    }


def require_settings(path: Path, values: Mapping[str, Any], config_class: Any) -> None:
    """Refuse keys that would replace what a configuration class does, which shows only when it is to do it.

    Args:
        path: of the config.json.
        values: its content.
        config_class: transformers' configuration class of the family.

    Raises:
        TeacherError: a key is the name of a method.
    """
    for key, value in values.items():
        if key.startswith("__") or callable(getattr(config_class, key, None)):
            raise TeacherError(
                f"{path} has {key!r:.100}, which is no setting: {config_class.__name__} has a method of that name",
                hint="remove the key",
            )
        part = (config_class.sub_configs or {}).get(key)
        if isinstance(value, dict) and part is not None:
            require_settings(path, value, part)


def require_token_ids(path: Path, config: Any) -> None:
    """Refuse a first or last token that the vocabulary does not have; generation would fail, or never end.

    Args:
        path: of the config.json.
        config: what transformers made of it.

    Raises:
        TeacherError: such an id.
    """
    for key in ("bos_token_id", "eos_token_id"):
        value = getattr(config, key, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (type(number) is int and 0 <= number < config.vocab_size):
                raise TeacherError(
                    f"{path} says {key} is {str(number)[:40]!r}, expected an id below vocab_size {config.vocab_size:,}"
                )


def require_room(path: Path, model: Any, tensors: Mapping[str, TensorHeader]) -> None:
    """Refuse a configuration of a model that is far larger than its weights, before any memory is taken for it.

    Args:
        path: of the config.json.
        model: the model that it describes, laid out on the meta device.
        tensors: the weights' headers.

    Raises:
        TeacherError: more parameters than the weights have numbers, or tables that are far larger.
    """
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 2 * held:
        raise TeacherError(
            f"{path} describes {needed:,} parameters, the weights hold {held:,}",
            hint="the weights do not fit config.json: is the download complete?",
        )
    computed = sum(buffer.nbytes for buffer in model.buffers())
    if computed > _COMPUTED_BYTES + _COMPUTED_SHARE * sum(tensor.end - tensor.begin for tensor in tensors.values()):
        raise TeacherError(
            f"{path} describes a model that needs {computed:,} bytes beside its weights",
            hint="is max_position_embeddings right?",
        )


def require_weights(path: Path, model: Any, tensors: Mapping[str, TensorHeader]) -> None:
    """Refuse weights that are not those of the model in config.json, before any memory is taken for it.

    Args:
        path: of the config.json.
        model: the model that it describes, on the meta device.
        tensors: the weights' headers.

    Raises:
        TeacherError: too few elements for the parameters; a head that contradicts tie_word_embeddings; integers where
            the model has weights.
    """
    require_room(path, model, tensors)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        is_weight = name.endswith(".weight") or name in names or f"{model.base_model_prefix}.{name}" in names
        if tensor.dtype in INTEGER_BYTES and is_weight:
            raise TeacherError(
                f"{tensor.file} holds tensor {name} as {tensor.dtype}, expected floating-point numbers",
                hint="quantised weights cannot be trained against: use the teacher's plain version",
            )
    _require_head(path, model, tensors)


def require_plain_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose weights are quantised, or that names other files than those that are checked."""
    for key in _UNREAD_KEYS:
        if config.get(key):
            value = config[key]
            method = value.get("quant_method") if isinstance(value, dict) else value
            if method == "gguf":
                raise TeacherError(
                    f"{path} has {key} ('gguf'): transformers left it there when it read the model from a GGUF file",
                    hint="name the .gguf file itself as the teacher; or, if the weights are plain, remove that key",
                )
            raise TeacherError(
                f"{path} has {key} ({str(method)[:40]!r}), expected plain weights",
                hint="use the teacher's version that is not quantised, with its weights in model*.safetensors",
            )


def require_generation_settings(folder: Path) -> None:
    """Refuse a generation_config.json that is no JSON object; transformers alone would go on as if there were none.

    Raises:
        TeacherError: it is a pointer, not strict JSON, or no object.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        read_json_object(path)


def _require_head(path: Path, model: Any, tensors: Mapping[str, TensorHeader]) -> None:
    """Refuse a tie_word_embeddings that the weights contradict: transformers would make up a head, or drop one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    is_tied = head.weight is embedding.weight
    head_name, embedding_name = (f"{names[id(module)]}.weight" for module in (head, embedding))
    prefix = f"{model.base_model_prefix}."
    found_embedding = tensors.get(embedding_name) or tensors.get(embedding_name.removeprefix(prefix))
    # Some families' files have other names than their modules, such as embed_out; the shape of a head is rare.
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamed = (
        tensor
        for name, tensor in tensors.items()
        if (tensor.shape, tensor.dtype in FLOAT_BYTES) == (tuple(head.weight.shape), True)
        and not {name, prefix + name} & known
    )
    found_head = tensors.get(head_name) or next(renamed, None)
    if found_embedding is None:
        return  # loading the weights raises a clearer error
    if found_head is None and not is_tied:
        raise TeacherError(
            f"{path} says that head and embedding differ (tie_word_embeddings false), but the weights lack {head_name}",
            hint="is the download complete? If the model's head is its embedding, set tie_word_embeddings to true",
        )
    if found_head is not None and is_tied and not same_numbers(found_head, found_embedding):
        raise TeacherError(
            f"{path} says that head and embedding are one (tie_word_embeddings true), but {head_name} in the weights"
            f" differs from {embedding_name}",
            hint="set tie_word_embeddings to false if the model has a head of its own",
        )


def _require_sizes(path: Path, values: Mapping[str, Any], depth: int) -> None:
    if depth > 8:
        raise TeacherError(f"{path} is nested deeper than any configuration")
    for key, value in values.items():
        if isinstance(value, dict):
            _require_sizes(path, value, depth + 1)
            continue
        most = next((limit for pattern, limit in _MOST if pattern.search(key)), None)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if most is not None and number > most:
                raise TeacherError(
                    f"{path} says {key} is {_number(number)}, expected at most {most:,}",
                    hint="no published model is of that size: the file is damaged or a trap",
                )
            if number < 1 and _AT_LEAST_ONE.fullmatch(key):
                raise TeacherError(f"{path} says {key} is {_number(number)}, expected at least 1")


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) or abs(value) < 10**18 else "a number of too many digits"
