"""Read the header of a GGUF file, and compare it with the file, before a library reads either. No torch here.

Source: the GGUF specification, in the repository ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawkify.errors import MissingExtraError, TeacherError, quoted
from mohawkify.files.safetensors_headers import refuse_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the first counted in 32 bits
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32

# Far above every published model's: the vocabularies are a few megabytes, in lists of a few hundred thousand.
_LONGEST_HEADER = 1 << 27
_MOST_ITEMS = 1 << 23
_LONGEST_NAME = 200
_MOST_AXES = 4

_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it.

    Args:
        kind: ggml's name of its type, such as ``Q4_K``.
        shape: its sizes as torch orders them.
        begin: offset of its first byte in the file.
        end: offset behind its last byte.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header fits it.

    Args:
        path: the file.
        metadata: its keys and values.
        tensors: its tensors by ggml's names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def require_gguf() -> None:
    """Raise MissingExtraError where the package that knows GGUF's types is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "a teacher in a GGUF file") from error


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file; its tensors must fill the rest of it.

    Raises:
        TeacherError: no GGUF, damaged, truncated, one part of several, or of a size that no model has.
        MissingExtraError: the package ``gguf`` is not installed.
    """
    require_gguf()
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise TeacherError(f"{path} is no GGUF file: it does not begin with GGUF", hint=_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Header(path, content)
            version, num_tensors, num_keys = header.number("I"), header.number("Q"), header.number("Q")
            if version not in _VERSIONS:
                what = "written for big-endian machines" if not version & 0xFFFF else f"of version {version}"
                raise TeacherError(f"{path} is a GGUF file {what}, expected little-endian and version 2 or 3")
            metadata = dict(header.entry(number) for number in range(header.items(num_keys)))
            if len(metadata) != num_keys:
                raise damaged(path, "it has a key twice")
            entries = [header.tensor() for _ in range(header.items(num_tensors))]
    _require_whole(path, metadata)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"its alignment is {str(alignment)[:40]}, expected a power of two")
    start = _aligned(header.position, alignment)
    tensors = {name: _placed(path, name, start, each) for name, *each in entries}
    if len(tensors) != num_tensors:
        raise damaged(path, "it has a tensor twice")
    _require_filled(path, tensors, start, size, alignment)
    return GgufFile(path, metadata, tensors)


def damaged(path: Path, reason: str) -> TeacherError:
    """The error of a file that is not as it was written."""
    return TeacherError(f"{path} is damaged or truncated ({reason})", hint=_AGAIN)


class _Header:
    """The header of a file, read from its start; no length that it claims is believed.

    Args:
        path: the file, for messages.
        content: its bytes.
    """

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content = path, content
        self.position = len(_MAGIC)
        self.left = _MOST_ITEMS

    def items(self, count: int) -> int:
        """A number of things to come, refused where no model has so many."""
        self.left -= count
        if self.left < 0:
            raise damaged(self.path, f"its header claims more than {_MOST_ITEMS:,} entries")
        return count

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        end = self.position + count
        if end > len(self.content):
            raise damaged(self.path, f"its header claims {end:,} bytes, the file has {len(self.content):,}")
        if end > _LONGEST_HEADER:
            raise damaged(self.path, f"its header has more than {_LONGEST_HEADER:,} bytes")
        found = self.content[self.position : end]
        self.position = end
        return found

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        """The next numbers, in `struct`'s notation."""
        return struct.unpack(f"<{self.items(count)}{code}", self.bytes(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        """The next number."""
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        """The next string."""
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, "its header has a text that is not UTF-8") from error

    def name(self) -> str:
        """The next name."""
        name = self.string()
        if not 0 < len(name) <= _LONGEST_NAME:
            raise damaged(self.path, f"a name in its header has {len(name):,} letters")
        return name

    def value(self, kind: int) -> Any:
        """The next value of a type; an array becomes a list."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise damaged(self.path, f"its header has a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            return list(self.numbers(_NUMBERS[inner], count))
        if inner != _STRING:
            raise damaged(self.path, f"its header has an array of type {inner}")
        return [self.string() for _ in range(self.items(count))]

    def entry(self, number: int) -> tuple[str, Any]:
        """The next key and its value."""
        name = self.name()
        return name, self.value(self.number("I"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The next tensor: its name, its shape as torch orders it, its type and its offset."""
        name, axes = self.name(), self.number("I")
        if not 0 < axes <= _MOST_AXES:
            raise damaged(self.path, f"tensor {quoted(name)} has {axes} axes")
        return name, self.numbers("Q", axes)[::-1], self.number("I"), self.number("Q")


def _require_whole(path: Path, metadata: dict[str, Any]) -> None:
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        raise TeacherError(f"{path} says general.type is {str(kind)[:40]!r}, expected 'model'")
    if parts not in (0, 1):
        raise TeacherError(
            f"{path} is one of {str(parts)[:40]} parts of a model, expected all of it",
            hint="merge them first: llama-gguf-split --merge FIRST_PART MERGED.gguf",
        )


def _placed(path: Path, name: str, start: int, entry: Any) -> GgufTensor:
    """A tensor with its place in the file; `entry` is its shape, type and offset from `start`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shape, number, offset = entry
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise TeacherError(
            f"{path} holds tensor {quoted(name)} in ggml's type {number}, which the package gguf does not know",
            hint="pip install --upgrade gguf, or take a file in another type, such as Q8_0",
        ) from error
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % per_block:
        raise damaged(path, f"tensor {quoted(name)} has the sizes {list(shape)}, which do not fit its type {kind.name}")
    begin = start + offset
    return GgufTensor(kind.name, shape, begin, begin + math.prod(shape) // per_block * block_bytes)


def _require_filled(path: Path, tensors: dict[str, GgufTensor], start: int, size: int, alignment: int) -> None:
    """Refuse tensors that overlap, leave gaps or do not end where the file does; the last need not be padded."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != _aligned(end, alignment):
            raise damaged(path, "its tensors overlap or leave gaps")
        end = tensor.end
    if not end <= size <= _aligned(end, alignment):
        raise damaged(path, f"its tensors end at byte {end:,}, the file has {size:,}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
