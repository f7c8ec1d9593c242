"""Read the headers of a model's safetensors files, and compare them with the files and the index. No torch here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mohawkify.errors import MohawkifyError, TeacherError
from mohawkify.files.atomic import read_json
from mohawkify.files.strict_json import parse_json

GGUF = ".gguf"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Bytes per element. Other types (floats of 8 bits and fewer) are the weights of a quantised model.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
INTEGER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_AGAIN = "download or copy the file again"
_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_ONE_OF_A_SET = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_LONGEST_HEADER = 10_000_000
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as the header of its file describes it.

    Args:
        dtype: safetensors' name of its type, such as ``BF16``.
        begin: offset of its first byte in the file.
        end: offset behind its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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


def refuse_pointer(path: Path) -> None:
    """Refuse what git-lfs leaves in the place of a file that was not fetched; raises TeacherError."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise TeacherError(
                f"{path} is a git-lfs pointer, expected the file that it stands for",
                hint=f"run `git lfs pull` in {path.parent}",
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


def read_tensors(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a folder's weights.

    Returns:
        Every tensor by name.

    Raises:
        TeacherError: no safetensors; an index that names what it must not, lacks a file or disagrees with one; a file
            that is empty, damaged, truncated or a pointer; an unexpected dtype; a tensor in two files.
    """
    require_own_files(folder)
    index = folder / INDEX_FILE
    file_of = _read_index(index) if index.is_file() else None
    if file_of is not None:
        names = sorted(set(file_of.values()))
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise _no_weights(folder)
    for name in names:
        if not (folder / name).is_file():
            raise TeacherError(f"{folder / name} is missing; {INDEX_FILE} names it", hint="download the teacher again")
    if file_of is not None:
        _refuse_unlisted(folder, names)
    tensors: dict[str, TensorHeader] = {}
    for name in names:
        for key, tensor in read_header(folder / name).items():
            if key in tensors:
                raise TeacherError(
                    f"tensor {key!r} lies in two files of {folder}: {tensors[key].file.name} and {name}",
                    hint="the files are of different downloads: fetch the teacher again",
                )
            tensors[key] = tensor
    if file_of is not None:
        _compare_index(index, file_of, tensors)
    return tensors


def read_header(path: Path) -> dict[str, TensorHeader]:
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
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise _damaged(path, "its tensors overlap or leave gaps")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position:,}, the file has {size:,}")
    return tensors


def read_numbers(tensor: TensorHeader) -> Iterator[np.ndarray]:
    """The elements of a floating-point tensor, a part at a time, in a type that holds each exactly."""
    dtype = np.dtype(_NUMPY_DTYPES[tensor.dtype])
    content = np.memmap(tensor.file, dtype=np.uint8, mode="r")[tensor.begin : tensor.end]
    for begin in range(0, len(content), _ELEMENTS_AT_ONCE * dtype.itemsize):
        part = content[begin : begin + _ELEMENTS_AT_ONCE * dtype.itemsize].copy().view(dtype)
        # numpy has no BF16: it is the upper half of a float32.
        yield (part.astype("<u4") << 16).view("<f4") if tensor.dtype == "BF16" else part


def same_numbers(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two floating-point tensors are equal, element for element, whatever their types."""
    if one.shape != other.shape:
        return False
    return all(np.array_equal(*parts) for parts in zip(read_numbers(one), read_numbers(other), strict=True))


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


def refuse_gguf_alone(source: str, names: Iterable[str]) -> None:
    """Refuse a folder or a repository of the Hub whose only weights are GGUF files: which one is meant is unclear.

    Args:
        source: as the user gave it.
        names: of its files.

    Raises:
        TeacherError: there is a GGUF file and no safetensors.
    """
    found = sorted(name for name in names if name.endswith((GGUF, ".safetensors")))
    if not found or not all(name.endswith(GGUF) for name in found):
        return
    example, is_here = found[0], os.path.isdir(source)
    raise TeacherError(
        f"{source} holds its weights as GGUF only ({len(found)} files), expected one of them to be named",
        hint=f"name the file: {os.path.join(source, example)}"
        if is_here
        else f"fetch one and name it: hf download {source} {example} --local-dir .",
    )


def _no_weights(folder: Path) -> TeacherError:
    refuse_gguf_alone(str(folder), [path.name for path in folder.iterdir()])
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
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not file_of:
        raise TeacherError(f"{index} has no weight_map")
    for name in file_of.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise TeacherError(f"{index} names {name!r:.100}, expected a .safetensors file inside the folder")
    if not isinstance(content.get("metadata"), dict):
        raise TeacherError(f"{index} has no metadata, which transformers reads", hint='add "metadata": {}')
    return file_of


def _refuse_unlisted(folder: Path, names: list[str]) -> None:
    """A file that is named like a part of the model but is not in its index; files of other names are ignored."""
    for path in sorted(folder.iterdir()):
        is_part = path.name == SINGLE_FILE or _ONE_OF_A_SET.fullmatch(path.name)
        if is_part and path.name not in names:
            raise TeacherError(
                f"{path} is not listed in {INDEX_FILE}: it is unclear which files are the model",
                hint="remove the file, or download the teacher again",
            )


def _compare_index(index: Path, file_of: dict[str, str], tensors: dict[str, TensorHeader]) -> None:
    hint = "index and files are of different downloads: fetch the teacher again"
    for key, name in file_of.items():
        if key not in tensors or tensors[key].file.name != name:
            raise TeacherError(f"{index} says tensor {key!r:.100} is in {name}, which lacks it", hint=hint)
    for key, tensor in tensors.items():
        if key not in file_of:
            raise TeacherError(f"{tensor.file} has tensor {key!r:.100}, which {INDEX_FILE} does not list", hint=hint)


def _read_entry(path: Path, key: str, entry: Any, start: int) -> TensorHeader:
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
        raise _damaged(path, f"the entry of {key!r:.100} has no shape or offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise _damaged(path, f"tensor {key!r:.100} has {end - begin:,} bytes, which do not fit its shape")
    return TensorHeader(path, dtype, tuple(shape), start + begin, start + end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _damaged(path: Path, reason: str) -> TeacherError:
    return TeacherError(f"{path} is damaged or truncated ({reason})", hint=_AGAIN)


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data, "it")
    except MohawkifyError as error:
        raise _damaged(path, error.message) from error
