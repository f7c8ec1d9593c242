"""Which text a recipe means: what every stage reads, how often, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mohawkify.data.corpus import Corpus, Joined, hold_out, load_corpus, noted_corpus
from mohawkify.data.hub import Report, ignore
from mohawkify.data.loader import SampleRange
from mohawkify.data.packing import num_sequences
from mohawkify.data.text_files import find_files
from mohawkify.data.tokenize_progress import tokenize_progress
from mohawkify.data.validation import evaluation_rows
from mohawkify.data.write_corpus import CorpusRequest, build_corpus, bytes_to_write
from mohawkify.errors import DataError
from mohawkify.files import atomic
from mohawkify.recipe.schema import Recipe, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlannedRange(NamedTuple):
    """How far a stage reads into a corpus's global order, in samples of one length.

    Args:
        sequence_length: tokens per sample.
        first: the first sample.
        end: the sample behind the last.
        sequences_per_block: how many neighbouring samples are shuffled as one.
    """

    sequence_length: int
    first: int
    end: int
    sequences_per_block: int

    @property
    def block_length(self) -> int:
        """Tokens that are shuffled as one."""
        return self.sequence_length * self.sequences_per_block


def planned_ranges(recipe: Recipe) -> dict[str, list[PlannedRange]]:
    """The ranges that each stage's segments read; stages share a corpus's order, each after the end of the one before.

    What is shuffled is as long as the longest sequence that is read of a corpus, so that shorter ones are cut out of
    the same order. A length that does not divide it has an order of its own, and reads some text again.
    """
    used = {"train": 0, "final_phase": 0}
    found: dict[str, list[PlannedRange]] = {}
    for name, stage in recipe.stages.blocks().items():
        found[name] = []
        for segment in stage.segments():
            length, longest = segment.sequence_length, recipe.longest_sequence(segment.data)
            first = -(-used[segment.data] // length)
            count = segment.num_steps * stage.batch_sequences
            found[name].append(PlannedRange(length, first, first + count, 1 if longest % length else longest // length))
            used[segment.data] += count * length
    return found


def stage_ranges(recipe: Recipe, corpora: dict[str, Corpus]) -> dict[str, list[SampleRange]]:
    """The ranges of the corpora that every stage reads."""
    return {
        name: [
            sample_range_of(recipe, name, index, corpora[segment.data])
            for index, segment in enumerate(stage.segments())
        ]
        for name, stage in recipe.stages.blocks().items()
    }


def sample_range_of(recipe: Recipe, stage: str, index: int, corpus: Corpus) -> SampleRange:
    """The range of its corpus that one of a stage's segments reads."""
    segment, span = recipe.stages.blocks()[stage].segments()[index], planned_ranges(recipe)[stage][index]
    return SampleRange(corpus, segment.num_steps, segment.sequence_length, span.first, span.sequences_per_block)


def ranges_into(recipe: Recipe, data: str) -> list[PlannedRange]:
    """The ranges of ``train`` or ``final_phase`` that all stages together read."""
    found = planned_ranges(recipe)
    return [
        span
        for name, stage in recipe.stages.blocks().items()
        for segment, span in zip(stage.segments(), found[name], strict=True)
        if segment.data == data
    ]


def epochs_of(recipe: Recipe, data: str) -> int | None:
    """How often the text of ``train`` or ``final_phase`` is read; None for as often as need be."""
    return recipe.data.epochs if data == "train" else recipe.data.final_phase_epochs


def tokens_needed(recipe: Recipe, data: str) -> int:
    """How many tokens of ``train`` or ``final_phase`` are enough for the epochs the recipe allows."""
    epochs = epochs_of(recipe, data) or 1
    return max(
        (-(-span.end // (epochs * span.sequences_per_block)) * span.block_length for span in ranges_into(recipe, data)),
        default=0,
    )


def epochs_needed(recipe: Recipe, data: str, num_tokens: int) -> int:
    """How often so many tokens of ``train`` or ``final_phase`` have to be read."""
    return max(
        (
            -(-span.end // (max(1, num_tokens // span.block_length) * span.sequences_per_block))
            for span in ranges_into(recipe, data)
        ),
        default=0,
    )


@dataclass(frozen=True)
class TextReader:
    """Reads the text of a recipe with a teacher's tokenizer; what was tokenised once is used again.

    Args:
        recipe: names the sources and the budgets.
        tokenizer: the teacher's.
        directory: where tokenised text is kept.
        teacher_directory: the folder that ``teacher:`` paths start from.
        vocab_size: every token id must be below.
        prepared: where `mohawkify data prepare` put tokenised text; what fits is used where it lies.
        num_workers: processes that tokenise; 0 does it here.
        report: receives a line now and then.
        recorded: the result of `record` for the text that a run was made with: it is used as it lies in ``directory``,
            whatever has become of the sources.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    teacher_directory: Path
    vocab_size: int
    prepared: Path | None = None
    num_workers: int = 0
    report: Report = ignore
    recorded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def require_files(self, *names: str) -> None:
        """Check that the local files exist of ``train``, ``final_phase``, ``validation`` or, without names, all.

        Raises:
            DataError: one is missing; raised before anything slow.
        """
        for name in names or ("train", "final_phase", "validation"):
            for source in getattr(self.recipe.data, name):
                if source.path is not None:
                    find_files(source, self.teacher_directory)

    def training(self) -> dict[str, Corpus]:
        """The corpora that the stages read: ``train``, and ``final_phase`` where a stage has one.

        Raises:
            DataError: the text cannot be read, or ends before the stages do.
        """
        return {name: self.stage_text(name) for name in ("train", "final_phase") if name in self.requests}

    def stage_text(self, name: str) -> Corpus:
        """One of the corpora that the stages read, without what is held out.

        Raises:
            DataError: the text cannot be read, or ends before the stages do.
        """
        is_split = name == "train" and "validation" not in self.requests
        corpus = self._split_train()[0] if is_split else self.corpus(name)
        self._require_enough(name, corpus)
        return corpus

    def held_out(self) -> list[np.ndarray]:
        """The rows of text that students are measured on; see `evaluation_rows`."""
        evaluation = self.recipe.evaluation
        corpus = self.corpus("validation") if "validation" in self.requests else self._split_train()[1]
        return evaluation_rows(corpus, sequence_length=evaluation.sequence_length, num_tokens=evaluation.tokens)

    @cached_property
    def requests(self) -> dict[str, CorpusRequest]:
        """The corpora of the recipe: ``train``, and ``validation`` and ``final_phase`` if it has them."""
        data, held = self.recipe.data, self.recipe.evaluation.tokens
        train, final_phase = (tokens_needed(self.recipe, name) for name in ("train", "final_phase"))
        found = {"train": self._request(data.train, max(train, 1) if data.validation else train + held)}
        if data.validation:
            found["validation"] = self._request(data.validation, held)
        if final_phase:
            found["final_phase"] = self._request(data.final_phase, final_phase)
        return found

    def corpus(self, name: str) -> Corpus:
        """One of the corpora, found or made.

        Raises:
            DataError: the text cannot be read, or was made with more bad rows than the recipe allows.
        """
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def record(self) -> dict[str, dict[str, str]]:
        """By name, the ``key`` under which each corpus lies in the directory, and its ``fingerprint``."""
        return {
            name: {"key": request.key, "fingerprint": self.corpus(name).fingerprint}
            for name, request in self.requests.items()
        }

    @cached_property
    def _opened(self) -> dict[str, Corpus]:
        return {}

    def _open(self, name: str) -> Corpus:
        request, known = self.requests[name], self.recorded.get(name)
        if known is not None and is_prepared(known["key"], self.directory, self.directory):
            return open_prepared(known["key"], self.directory, request.vocab_size)
        found = find_prepared(request.key, self.directory, self.prepared, request.vocab_size)
        if found is None:
            with tokenize_progress(name, request.num_tokens or 0, self.report) as progress:
                found = build_corpus(
                    request, self.directory, num_workers=self.num_workers, progress=progress, report=self.report
                )
        if found.bad_rows > request.skip_bad_rows:
            raise DataError(
                f"the tokenised text of data.{name} was made without {found.bad_rows:,} bad rows, more than"
                f" data.skip_bad_rows, {request.skip_bad_rows:,}",
                hint=f"allow them (data.skip_bad_rows={found.bad_rows}), or mend the rows",
            )
        if found.bad_rows:
            self.report(f"data.{name}: bad rows passed over: {found.bad_rows:,}; the first: {found.first_error}")
        if known is not None and found.fingerprint != known["fingerprint"]:
            self.report(
                f"warning: the text of data.{name} has changed since the run: its metrics do not compare with these"
            )
        return found

    def bytes_to_write(self, *names: str) -> int:
        """The size on the disk of the text that is not tokenised yet, as far as it is known.

        Text that is read as often as need be may be short: how much of it there is shows when it has been read.

        Args:
            names: of ``train``, ``final_phase`` and ``validation``; all without a name.
        """
        known = [
            self.requests[name]
            for name in names or self.requests
            if name == "validation" or epochs_of(self.recipe, name) is not None
        ]
        missing = [each for each in known if not is_prepared(each.key, self.directory, self.prepared)]
        return sum(bytes_to_write(each, self.directory) for each in missing)

    def _request(self, sources: Sequence[Source], num_tokens: int) -> CorpusRequest:
        return CorpusRequest(
            sources,
            self.tokenizer,
            num_tokens,
            self.teacher_directory,
            self.vocab_size,
            self.recipe.data.skip_bad_rows,
        )

    def _split_train(self) -> tuple[Corpus, Corpus]:
        """The training text and, from its end, the held-out text that the recipe does not name."""
        return hold_out(self.corpus("train"), self.recipe.evaluation.tokens)

    def _require_enough(self, data: str, corpus: Corpus) -> None:
        for span in ranges_into(self.recipe, data):
            num_sequences(corpus, span.block_length)  # refuses text that is shorter than a single one
        completion = corpus.completion.parts if isinstance(corpus.completion, Joined) else [corpus.completion]
        if corpus.completion is not None and not any(np.any(part) for part in completion):
            raise DataError(
                f"none of the {corpus.num_tokens:,} tokens taken of data.{data} is a completion: no prediction would"
                " count",
                hint="give conversations with answers, more tokens, or fewer epochs; or loss: all",
            )
        epochs, needed = epochs_of(self.recipe, data), epochs_needed(self.recipe, data, corpus.num_tokens)
        if epochs is None or needed <= epochs:
            return
        key = "data.epochs" if data == "train" else "data.final_phase_epochs"
        raise DataError(
            f"the text of data.{data} has {corpus.num_tokens:,} tokens, but {tokens_needed(self.recipe, data):,} are"
            f" needed where it is read {'once' if epochs == 1 else f'{epochs} times'}; it would have to be read"
            f" {needed} times",
            hint=f"give more text or fewer tokens to the stages, or allow it with {key}: {needed} (null: no limit)",
        )


def is_prepared(key: str, directory: Path, prepared: Path | None) -> bool:
    """Whether a corpus lies elsewhere than among a run's own, so that the run makes none."""
    return (directory / f"{key}.json").is_file() or (prepared is not None and (prepared / key).is_dir())


def find_prepared(key: str, directory: Path, prepared: Path | None, vocab_size: int) -> Corpus | None:
    """A corpus that lies elsewhere than among a run's own; the run notes where, and what it was.

    Args:
        key: its name.
        directory: the run's own corpora.
        prepared: where others may lie.
        vocab_size: rows of the teacher's embedding.

    Raises:
        DataError: the run has used text that is no longer where it was, or is another.
    """
    if (directory / key).exists():
        return None
    if (directory / f"{key}.json").is_file():
        return open_prepared(key, directory, vocab_size)
    if prepared is None or not (prepared / key).is_dir():
        return None
    corpus = load_corpus(prepared / key, vocab_size)
    atomic.ensure_writable(directory)
    atomic.write_json(
        directory / f"{key}.json", {"folder": str((prepared / key).resolve()), "fingerprint": corpus.fingerprint}
    )
    return corpus


def open_prepared(key: str, directory: Path, vocab_size: int) -> Corpus:
    """A corpus that lies in a directory, or elsewhere where a note there says so; raises DataError if it is damaged."""
    load = partial(load_corpus, vocab_size=vocab_size)
    folder = directory / key
    return load(folder) if folder.is_dir() else noted_corpus(directory / f"{key}.json", load)
