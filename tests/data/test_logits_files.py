"""Kept teacher logits whose manifests fit their files and still are none, as whoever edits a folder can make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.errors import CheckpointError, DataError
from mohawkify.files import atomic
from tests.data.test_teacher_logits import logits_of, write

SEQUENCES = "about/sequences.bin"


def reseal(folder: Path) -> None:
    facts = json.loads((folder / atomic.MANIFEST_NAME).read_text())["facts"]
    (folder / atomic.MANIFEST_NAME).unlink()
    atomic._write_manifest(folder, facts)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    write(tmp_path / "kept", logits_of(4, 5, 17), 3)
    return tmp_path / "kept"


CASES: dict[str, Callable[[np.ndarray], bytes]] = {
    "unsorted": lambda numbers: numbers[::-1].tobytes(),
    "twice": lambda numbers: np.repeat(numbers, 2).tobytes(),
    "negative": lambda numbers: (numbers - 5).tobytes(),
    "none": lambda numbers: b"",
    "3 bytes": lambda numbers: b"abc",
    "a byte more": lambda numbers: numbers.tobytes() + b"x",
}


@pytest.mark.parametrize("name", CASES)
def test_sequences_that_do_not_rise_are_refused(kept: Path, name: str) -> None:
    (kept / SEQUENCES).write_bytes(CASES[name](np.fromfile(kept / SEQUENCES, dtype="<i8")))
    reseal(kept / "about")
    with pytest.raises(DataError, match="does not say which sequences"):
        TeacherLogits(kept)


def test_missing_files_are_refused(kept: Path) -> None:
    (kept / "shard-000000" / "records.bin").unlink()
    reseal(kept / "shard-000000")
    with pytest.raises(DataError, match="belongs to other teacher logits"):
        TeacherLogits(kept).read(np.array([0]))
    (kept / "about" / "vocabulary.json").unlink()
    reseal(kept / "about")
    with pytest.raises(DataError, match=r"vocabulary\.json"):
        TeacherLogits(kept).vocabulary()
    (kept / SEQUENCES).unlink()
    reseal(kept / "about")
    with pytest.raises(DataError, match="does not say which sequences"):
        TeacherLogits(kept)


@pytest.mark.parametrize("name", ["about", "shard-000000"])
def test_links_in_the_place_of_folders_are_refused(kept: Path, tmp_path: Path, name: str) -> None:
    (kept / name).rename(tmp_path / "outside")
    (kept / name).symlink_to(tmp_path / "outside")

    def use() -> torch.Tensor:
        logits = TeacherLogits(kept)
        logits.identity()
        return logits.read(np.array([0])).ids_blk

    with pytest.raises((DataError, CheckpointError), match="is a link, expected a folder"):
        use()
