"""What the files of a teacher claim, compared with what is there, before a library reads them. No torch here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawkify.errors import MohawkifyError, TeacherError
from mohawkify.files.atomic import read_json
from mohawkify.files.strict_json import parse_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Bytes per number. What is not here (8 bits and fewer for floats) are the weights of a quantised model.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INTEGER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# Keys that make transformers run code of the folder or, where its package `kernels` is installed, of the Hub.
_CODE_KEYS = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?")

_AGAIN = "download or copy the file again"
_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_ONE_OF_A_SET = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_LONGEST_HEADER = 10_000_000
_LONGEST_CONFIG = 10_000_000
_BYTES_AT_ONCE = 1 << 24

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


@dataclass(frozen=True)
class ClaimedTensor:
    """A tensor as the header of its file describes it.

    Args:
        file: where it lies.
        dtype: safetensors' name of its type, such as ``BF16``.
        shape: its sizes.
        begin: offset of its first byte in the file.
        end: offset behind its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def require_config(path: Path) -> dict[str, Any]:
    """Refuse a config.json that is none, or whose sizes no model has: laying it out could take all time and memory.

    Returns:
        What it says.

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


def require_room(path: Path, model: Any, tensors: Mapping[str, ClaimedTensor]) -> None:
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


def require_own_files(folder: Path) -> None:
    """Refuse a folder whose entries lead out of it, or that is an adapter to another model.

    The Hub's cache is a folder of links into the same model's ``blobs``; those are its own files.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for entry in _links(home):
        if not any(_target(entry).is_relative_to(root) for root in allowed):
            raise TeacherError(
                f"{folder / entry.relative_to(home)} is a link that leads out of the folder",
                hint="put a copy of the file in its place",
            )
    if (folder / "adapter_config.json").exists():
        raise TeacherError(
            f"{folder} holds adapter_config.json: an adapter to another model, expected the model itself",
            hint="merge the adapter into its model (peft: merge_and_unload) and save that, without the adapter",
        )


def read_tensors(folder: Path) -> dict[str, ClaimedTensor]:
    """Read the headers of a folder's weights.

    Returns:
        Every tensor by name.

    Raises:
        TeacherError: no safetensors; an index that names what it must not, lacks a file or disagrees with one; a file
            that is empty, damaged, truncated or a pointer; an unexpected dtype; a tensor in two files.
    """
    require_own_files(folder)
    index = folder / INDEX_FILE
    places = _read_index(index) if index.is_file() else None
    if places is not None:
        names = sorted(set(places.values()))
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise _no_weights(folder)
    for name in names:
        if not (folder / name).is_file():
            raise TeacherError(f"{folder / name} is missing; {INDEX_FILE} names it", hint="download the teacher again")
    if places is not None:
        _refuse_unlisted(folder, names)
    tensors: dict[str, ClaimedTensor] = {}
    for name in names:
        for key, tensor in read_header(folder / name).items():
            if key in tensors:
                raise TeacherError(
                    f"tensor {key!r} lies in two files of {folder}: {tensors[key].file.name} and {name}",
                    hint="the files are of different downloads: fetch the teacher again",
                )
            tensors[key] = tensor
    if places is not None:
        _compare_index(index, places, tensors)
    return tensors


def require_plain_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose weights are quantised, or that names other files than those that are checked."""
    for key in _UNREAD_KEYS:
        if config.get(key):
            value = config[key]
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise TeacherError(
                f"{path} has {key} ({str(method)[:40]!r}), expected plain weights",
                hint="use the teacher's version that is not quantised, with its weights in model*.safetensors",
            )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a model.

    Raises:
        TeacherError: a pointer, not strict JSON, or no object.
    """
    refuse_pointer(path)
    content = _parsed(path, path.read_bytes())
    if not isinstance(content, dict):
        raise TeacherError(f"{path} holds a {type(content).__name__}, expected a JSON object", hint=_AGAIN)
    return content


def require_generation_settings(folder: Path) -> None:
    """Refuse a generation_config.json that is no JSON object; transformers alone would go on as if there were none.

    Raises:
        TeacherError: it is a pointer, not strict JSON, or no object.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        read_json_object(path)


def refuse_pointer(path: Path) -> None:
    """Refuse what git-lfs leaves in the place of a file that was not fetched; raises TeacherError."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise TeacherError(
                f"{path} is a git-lfs pointer, expected the file that it stands for",
                hint=f"run `git lfs pull` in {path.parent}",
            )


def same_content(one: ClaimedTensor, other: ClaimedTensor) -> bool:
    """Whether two tensors are equal to the bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.begin)
        right.seek(other.begin)
        remaining = one.end - one.begin
        while remaining:
            length = min(remaining, _BYTES_AT_ONCE)
            if left.read(length) != right.read(length):
                return False
            remaining -= length
    return True


def _links(home: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(home):
        for name in sorted(folders + files):
            if os.path.islink(os.path.join(folder, name)):
                yield Path(folder, name)


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        return Path("/")


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


def _no_weights(folder: Path) -> TeacherError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    found = f"only {pickles[0]}, a pickle," if pickles else "no weights,"
    return TeacherError(
        f"{folder} holds {found} expected {SINGLE_FILE}" + ("" if pickles else " or shards with an index"),
        hint="convert it to safetensors first: pickles can run code and are never read" if pickles else None,
    )


def _read_index(index: Path) -> dict[str, str]:
    """The file of every tensor by its name."""
    refuse_pointer(index)
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise TeacherError(f"{index} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise TeacherError(f"{index} names {name!r:.100}, expected a .safetensors file inside the folder")
    return places


def _refuse_unlisted(folder: Path, names: list[str]) -> None:
    """A file that is named like a part of the model but is not in its index; others beside it are nobody's concern."""
    for path in sorted(folder.iterdir()):
        is_part = path.name == SINGLE_FILE or _ONE_OF_A_SET.fullmatch(path.name)
        if is_part and path.name not in names:
            raise TeacherError(
                f"{path} is not listed in {INDEX_FILE}: it is unclear which files are the model",
                hint="remove the file, or download the teacher again",
            )


def _compare_index(index: Path, places: dict[str, str], tensors: dict[str, ClaimedTensor]) -> None:
    hint = "index and files are of different downloads: fetch the teacher again"
    for key, name in places.items():
        if key not in tensors or tensors[key].file.name != name:
            raise TeacherError(f"{index} says tensor {key!r:.100} is in {name}, which lacks it", hint=hint)
    for key, tensor in tensors.items():
        if key not in places:
            raise TeacherError(f"{tensor.file} has tensor {key!r:.100}, which {INDEX_FILE} does not list", hint=hint)
    if not isinstance(read_json(index).get("metadata"), dict):
        raise TeacherError(f"{index} has no metadata, which transformers looks into", hint='add "metadata": {}')


def read_header(path: Path) -> dict[str, ClaimedTensor]:
    """The tensors of one file; together they must fill it to the byte."""
    size = path.stat().st_size
    if size == 0:
        raise TeacherError(f"{path} is empty", hint=_AGAIN)
    refuse_pointer(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER and length + 8 <= size:
            raise TeacherError(f"{path} has a header of {length:,} bytes, expected at most {_LONGEST_HEADER:,}")
        if length + 8 > size:
            raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
        header = _parsed(path, file.read(length))
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    tensors = {key: _read_entry(path, key, entry, 8 + length) for key, entry in header.items() if key != "__metadata__"}
    place = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != place:
            raise _damaged(path, "its tensors overlap or leave gaps")
        place = tensor.end
    if place != size:
        raise _damaged(path, f"its tensors end at byte {place:,}, the file has {size:,}")
    return tensors


def _read_entry(path: Path, key: str, entry: Any, start: int) -> ClaimedTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {key!r:.100} is incomplete")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    width = {**FLOAT_BYTES, **INTEGER_BYTES}.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise TeacherError(
            f"{path} holds tensor {key!r:.100} as {dtype!r:.20}, expected one of {', '.join(FLOAT_BYTES)}",
            hint="quantised weights cannot be trained against: use the teacher's plain version",
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the entry of {key!r:.100} has no shape or place")
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise _damaged(path, f"tensor {key!r:.100} has {end - begin:,} bytes, which do not fit its shape")
    return ClaimedTensor(path, dtype, tuple(shape), start + begin, start + end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _damaged(path: Path, reason: str) -> TeacherError:
    return TeacherError(f"{path} is damaged or truncated ({reason})", hint=_AGAIN)


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data, "it")
    except MohawkifyError as error:
        raise _damaged(path, error.message) from error
