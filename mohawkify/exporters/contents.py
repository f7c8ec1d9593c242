"""Checks the tensors in an export's files, one by one, against those of its target and precision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mohawkify.errors import CheckpointError, ExportError, TeacherError
from mohawkify.files.safetensors_headers import read_tensors

STORED_AS = {"bfloat16": "BF16", "float32": "F32"}  # safetensors' names of the precisions
PRECISE = "F32"
WORD, WORD_BITS = "U32", 32  # what MLX packs quantised weights into
USUAL_GROUP = 64
WEIGHT, SCALES, OFFSETS = ".weight", ".scales", ".biases"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        dtype: safetensors' name of its type.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How the weights of a module are quantised.

    Args:
        bits: of each.
        group_size: neighbours that share a scale and an offset.
    """

    bits: int
    group_size: int


@dataclass(frozen=True)
class Quantised:
    """The modules of a model after quantisation by a target.

    Args:
        bits: that it is named after.
        packed: modules that are quantised, by name.
        plain: modules that stay plain because no group size divides their width.
    """

    bits: int
    packed: dict[str, Packing] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)


def expected_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, quantised: Quantised | None, precise: Iterable[str]
) -> dict[str, Stored]:
    """The tensors an export must have; in a quantised one every matrix is packed that is neither precise nor plain.

    MLX's convolutions of single channels are no matrices: their last size is 1.

    Args:
        shapes: of the student's tensors, all floating-point, by the name they have in the export.
        dtype: precision of what is neither quantised nor precise, a key of `STORED_AS`.
        quantised: what was quantised and how; None where the target does not quantise.
        precise: patterns of the parameters that stay in float32.
    """
    expected: dict[str, Stored] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(WEIGHT)
        packing = None
        if quantised is not None and len(shape) > 1 and shape[-1] > 1 and module not in quantised.plain:
            packing = quantised.packed.get(module, Packing(quantised.bits, USUAL_GROUP))
        if any(re.search(pattern, name) for pattern in precise):
            expected[name] = Stored(PRECISE, shape)
        elif packing is None:
            expected[name] = Stored(STORED_AS[dtype], shape)
        else:
            expected[name] = Stored(WORD, (*shape[:-1], shape[-1] * packing.bits // WORD_BITS))
            for part in (SCALES, OFFSETS):
                expected[module + part] = Stored(STORED_AS[dtype], (*shape[:-1], shape[-1] // packing.group_size))
    return expected


def require_contents(folder: Path, expected: Mapping[str, Stored]) -> dict[str, dict[str, int]]:
    """Compare the headers of an export's files, which account for every byte in them, with what they must hold.

    Args:
        folder: the export.
        expected: every tensor by name.

    Returns:
        By dtype, how many ``tensors`` there are and how many ``elements`` they hold.

    Raises:
        ExportError: a tensor is missing, left over, of another dtype or shape; or the files are damaged.
    """
    try:
        found = {name: Stored(tensor.dtype, tensor.shape) for name, tensor in read_tensors(folder).items()}
    except (TeacherError, CheckpointError) as error:
        raise ExportError(f"the export was not written as it should be: {error.message}") from error
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ExportError(
                f"the export holds {name} as {_shown(found.get(name))}, expected {_shown(expected.get(name))}",
                hint="another version of the target's library may write it otherwise: install the one that is tested",
            )
    table: dict[str, dict[str, int]] = {}
    for stored in found.values():
        row = table.setdefault(stored.dtype, {"tensors": 0, "elements": 0})
        row["tensors"] += 1
        row["elements"] += prod(stored.shape)
    return dict(sorted(table.items()))


def _shown(stored: Stored | None) -> str:
    return "nothing" if stored is None else f"{stored.dtype} of {' x '.join(map(str, stored.shape)) or 'one number'}"
