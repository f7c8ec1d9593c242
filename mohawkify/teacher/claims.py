"""What the files of a teacher claim, compared with what is there, before a library reads them. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawkify.errors import MohawkifyError, TeacherError
from mohawkify.storage import file_sha256, read_json
from mohawkify.strict_json import parse_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Bytes per number. What is not here (8 bits and fewer for floats) are the weights of a quantised model.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INTEGER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# Keys that make transformers run code of the folder or, where its package `kernels` is installed, of the Hub.
CODE_KEYS = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?")

# What decides how text becomes tokens and how a student writes, not what the teacher computes. transformers reads the
# first three where there is no tokenizer.json, and the others beside it (measured with 5.5).
TEXT_FILES = (
    *("vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"),
)

_AGAIN = "download or copy the file again"
_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_ONE_OF_A_SET = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_LONGEST_HEADER = 10_000_000
_LONGEST_CONFIG = 10_000_000
_BYTES_AT_ONCE = 1 << 24

# Far above every published model, far below what takes minutes to lay out or overflows a count of elements.
_MOST = (
    (re.compile(r"vocab"), 2**24),
    (re.compile(r"position|seq|length|window|ctx"), 2**31 - 1),
    (re.compile(r"(layer|block)s?$|num_labels"), 500),
    (re.compile(r"(head|expert|group)s?$"), 1024),  # some families lay out a module for each
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
        TeacherError: a pointer, too long, no JSON object, or a size beyond every published model's.
        CheckpointError: not strict JSON.
    """
    _refuse_pointer(path)
    if path.stat().st_size > _LONGEST_CONFIG:
        raise TeacherError(f"{path} has {path.stat().st_size:,} bytes, expected a configuration of a few thousand")
    config = read_json(path)
    if not isinstance(config, dict):
        raise TeacherError(
            f"{path} holds a {type(config).__name__}, expected a JSON object",
            hint="expected the config.json of a transformers model",
        )
    _require_sizes(path, config, depth=0)
    return config


def require_own_files(folder: Path) -> None:
    """Refuse a folder whose entries lead out of it, or that is an adapter to another model.

    The Hub's cache is a folder of links into the same model's ``blobs``; those are its own files.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for entry in _entries(home):
        if not entry.is_symlink():
            continue
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


def text_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of a teacher's `TEXT_FILES`, of those that are there."""
    return {name: file_sha256(folder / name) for name in TEXT_FILES if (folder / name).is_file()}


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


def require_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are damaged, are pointers, or send the reader out of the folder.

    Raises:
        TeacherError: a link or a name that leads out of the folder, or tokens that share an id.
        CheckpointError: not strict JSON.
    """
    require_own_files(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        _refuse_pointer(path)
        content = _parsed(path, path.read_bytes())
        if not isinstance(content, dict):
            raise TeacherError(f"{path} holds a {type(content).__name__}, expected a JSON object", hint=_AGAIN)
        if name == "tokenizer_config.json":
            _require_plain_names(path, content)


def require_distinct_ids(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Refuse a vocabulary in which two tokens have one id: text would come back as other text."""
    owners: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in owners:
            raise TeacherError(
                f"the tokenizer in {folder} gives id {number} to two tokens: {owners[number]!r:.40} and {token!r:.40}",
                hint="its files are damaged or of different models: download them again",
            )
        owners[number] = token


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


def _entries(home: Path) -> list[Path]:
    templates = home / "additional_chat_templates"  # the one folder inside that transformers reads
    return [*home.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]


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
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            most = next((limit for pattern, limit in _MOST if pattern.search(key)), None)
            if most is not None and value > most:
                raise TeacherError(
                    f"{path} says {key} is {_number(value)}, expected at most {most:,}",
                    hint="no published model is of that size: the file is damaged or a trap",
                )
            if value < 1 and _AT_LEAST_ONE.fullmatch(key):
                raise TeacherError(f"{path} says {key} is {_number(value)}, expected at least 1")


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) or abs(value) < 10**18 else "a number of too many digits"


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise TeacherError(
                f"{path} is a git-lfs pointer, expected the file that it stands for",
                hint=f"run `git lfs pull` in {path.parent}",
            )


def _no_weights(folder: Path) -> TeacherError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    found = f"only {pickles[0]}, a pickle," if pickles else "no weights,"
    return TeacherError(
        f"{folder} holds {found} expected {SINGLE_FILE}" + ("" if pickles else " or shards with an index"),
        hint="convert it to safetensors first: pickles can run code and are never read" if pickles else None,
    )


def _read_index(index: Path) -> dict[str, str]:
    """The file of every tensor by its name."""
    _refuse_pointer(index)
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
    _refuse_pointer(path)
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


def _require_plain_names(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse names of files that some versions of transformers would follow out of the folder."""
    listed = config.get("fast_tokenizer_files") or []
    for name in listed if isinstance(listed, list) else [listed]:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise TeacherError(f"{path} names {name!r:.100}, expected files inside the folder")
    for key in ("tokenizer_file", "vocab_file", "merges_file", "spm_file"):
        name = config.get(key)
        # Published files have leftovers of the machine they were made on, which lead nowhere here.
        if isinstance(name, str) and name and Path(name).name != name and _is_there(path.parent / name):
            raise TeacherError(
                f"{path} names {name!r:.100} as {key}, a file outside the folder", hint=f"remove the key {key}"
            )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not a name at all
        return False
