"""The teacher that finishes a run, or that is asked for its logits: looked at early, loaded when its turn comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.adapter import Adapter
from mohawkify.data.encoding import tokenizer_hash
from mohawkify.teacher.inspect import inspect_teacher
from mohawkify.teacher.load import load_teacher, load_tokenizer, teacher_hashes
from mohawkify.teacher.locate import find_folder, teacher_name
from mohawkify.teacher.quantise import require_quantiser


@dataclass(frozen=True)
class OtherTeacher:
    """A teacher whose files were looked at and found to be whole, but whose weights are not in memory.

    Args:
        source: as the user wrote it.
        folder: where its files are.
        adapter: its family.
        tokenizer: its tokenizer.
        vocabulary_size: rows of its embedding.
        num_parameters: all of its parameters.
        files: the sha256 of every file that decides what it computes.
        bits: 8 or 4 to take its weights in so many bits; None to leave them.
    """

    source: str
    folder: Path
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    num_parameters: int
    files: dict[str, str]
    bits: int | None

    @property
    def name(self) -> str:
        """The last part of its path or Hub id."""
        return teacher_name(self.source)

    def facts(self) -> dict[str, Any]:
        """What a run or a folder of logits records of it."""
        return {"source": self.source, "model_type": self.adapter.model_type, "files": self.files, "bits": self.bits}

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Its weights, frozen; see `load_teacher`."""
        return load_teacher(self.folder, dtype=dtype, device=device, bits=self.bits)


def find_teacher(source: str, bits: int | None) -> OtherTeacher:
    """Look at a teacher's files; everything that can be refused without loading weights is refused here.

    Args:
        source: a Hub id or a folder.
        bits: 8, 4 or None.

    Raises:
        TeacherError: no such teacher, or its files are not what they claim to be.
        MissingExtraError: the bits need a package that is not installed.
    """
    if bits is not None:
        require_quantiser(bits)
    inspection = inspect_teacher(source)
    folder = find_folder(source)
    rows = inspection.spec.vocabulary_size
    return OtherTeacher(
        source=source,
        folder=folder,
        adapter=inspection.adapter,
        tokenizer=load_tokenizer(folder, rows),
        vocabulary_size=rows,
        num_parameters=inspection.spec.num_parameters,
        files=teacher_hashes(folder),
        bits=bits,
    )


def tokenizer_note(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> str | None:
    """A line where two tokenizers of one vocabulary would still cut text differently; the first one's cut counts."""
    if tokenizer_hash(first) == tokenizer_hash(other):
        return None
    return f"note: the tokenizer of {name} has the same tokens but other rules; the text is cut by the first one's"
