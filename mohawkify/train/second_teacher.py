"""The teacher of a final phase, or of cached logits: validated early, loaded when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mohawkify.data.loader import SampleRange, sequences_of
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.data.tokenize import tokenizer_hash
from mohawkify.errors import DataError, TeacherError
from mohawkify.recipe.schema import Recipe
from mohawkify.teacher.lm_head import verify_head
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.quantize import require_quantiser
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.teacher.soundness import require_sound


@dataclass(frozen=True)
class SecondTeacher:
    """A teacher beside the first: its files are validated, its weights are not in memory.

    Args:
        teacher: resolved, with its weights at hand.
        bits: 8 or 4 to quantise its weights when they are loaded; None to leave them.
    """

    teacher: ResolvedTeacher
    bits: int | None

    def facts(self) -> dict[str, Any]:
        """Its record in a run or a folder of logits."""
        teacher = self.teacher
        return {
            "name": teacher.name,
            "model_type": teacher.adapter.model_type,
            "files": teacher.file_hashes,
            "bits": self.bits,
            **({"gguf": teacher.gguf} if teacher.gguf else {}),
        }

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Load its weights, frozen, and verify its head; see `load_teacher` and `verify_head`."""
        model = load_teacher(self.teacher, dtype=dtype, device=device, bits=self.bits)
        verify_head(model, self.teacher.adapter, self.teacher.spec.vocab_size)
        return model


def find_teacher(source: str, bits: int | None) -> SecondTeacher:
    """Resolve a second teacher; everything that can be refused without loading weights is refused here.

    Args:
        source: a Hub id or a folder.
        bits: 8, 4 or None.

    Raises:
        TeacherError: no such teacher, or its files are not what they claim to be.
        MissingExtraError: the bits need a package that is not installed.
    """
    if bits is not None:
        require_quantiser(bits)
    teacher = resolve_teacher(source, need="weights")
    require_sound(teacher)
    return SecondTeacher(teacher, bits)


def tokenizer_note(first: ResolvedTeacher, other: ResolvedTeacher) -> str | None:
    """A line where two tokenizers of one vocabulary would still cut text differently; the first one's cut counts."""
    if tokenizer_hash(first.tokenizer) == tokenizer_hash(other.tokenizer):
        return None
    return (
        f"note: the tokenizer of {other.name} has the same tokens but other rules; the text is cut by the first one's"
    )


FinalTeacher = SecondTeacher | TeacherLogits


def find_final_teacher(recipe: Recipe) -> FinalTeacher | None:
    """The teacher of the final phase of stage 3, validated but not loaded; None if it is the first teacher.

    Raises:
        TeacherError: no such teacher, or its files are not what they claim to be.
        RecipeError: the phase's sequences are longer than its learned positions.
        DataError: no such logits, or not all of them.
    """
    named = recipe.stages.second_teacher()
    if named is None:
        return None
    stage, final_phase = named
    if final_phase.teacher is not None:
        found = find_teacher(final_phase.teacher, final_phase.teacher_bits)
        found.teacher.spec.require_length(f"stages.{stage}.final_phase.sequence_length", final_phase.sequence_length)
        return found
    if final_phase.logits is not None:
        logits = TeacherLogits(Path(final_phase.logits))
        logits.require_complete()
        return logits
    return None


def final_teacher_hashes(final_teacher: FinalTeacher | None) -> dict[str, str]:
    """The hashes that make it part of a run's identity, under names that no file of the first teacher has."""
    if isinstance(final_teacher, SecondTeacher):
        return {f"final_phase/{name}": digest for name, digest in final_teacher.teacher.file_hashes.items()}
    return {} if final_teacher is None else {"final_phase/logits": final_teacher.identity()}


def require_same_vocabulary(first: Mapping[str, int], second: Mapping[str, int], names: tuple[str, str]) -> None:
    """Refuse two vocabularies that differ in any token; rows of an embedding that have no token do not matter.

    Args:
        first: the id of every token of the teacher that is converted.
        second: that of the other teacher.
        names: of both, for the message.

    Raises:
        TeacherError: names the differing token with the smallest id.
    """
    if dict(first) == dict(second):
        return
    tokens = [{index: token for token, index in vocabulary.items()} for vocabulary in (first, second)]
    index = min(i for i in tokens[0].keys() | tokens[1].keys() if tokens[0].get(i) != tokens[1].get(i))
    found = [f"is {each[index]!r}" if index in each else "has no token" for each in tokens]
    raise TeacherError(
        f"the vocabularies differ: id {index} {found[0]} in {names[0]} and {found[1]} in {names[1]}",
        hint="a student can be finished only by a teacher with the very same vocabulary",
    )


def require_fitting_tokens(final_teacher: FinalTeacher, first: ResolvedTeacher) -> str | None:
    """Refuse a teacher, or logits of one, with another vocabulary than the first teacher's.

    Args:
        final_teacher: the teacher or the logits.
        first: the teacher that is converted.

    Returns:
        A line to show, if there is anything worth it.

    Raises:
        TeacherError: names the first token that differs.
    """
    if isinstance(final_teacher, TeacherLogits):
        require_same_vocabulary(first.tokens, final_teacher.vocabulary(), (first.name, str(final_teacher.folder)))
        return None
    second = final_teacher.teacher
    require_same_vocabulary(first.tokens, second.tokens, (first.name, second.name))
    return tokenizer_note(first, second)


def require_fitting_text(logits: TeacherLogits, sample_range: SampleRange, batch_sequences: int, seed: int) -> None:
    """Refuse logits of other text, of sequences of another length, or of too few of them.

    Args:
        logits: the logits.
        sample_range: what is read with them.
        batch_sequences: sequences per step.
        seed: of the order.

    Raises:
        DataError: with the found and the expected value.
    """
    for what, found, expected in (
        ("text", logits.facts["text"], sample_range.corpus.fingerprint),
        ("sequence length", logits.layout.sequence_length, sample_range.sequence_length),
    ):
        if found != expected:
            raise DataError(
                f"{logits.folder} holds teacher logits for another {what}: {found}, expected {expected}",
                hint="write them with the recipe that reads them, and --for with the teacher that is converted",
            )
    logits.require_sequences(sequences_of(sample_range, batch_sequences, seed))
