"""Text to a corpus on disk, once: in shards, by one or several processes, after a kill from the last shard on."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from mohawkify.data.chat import require_chat_template
from mohawkify.data.corpus import (
    COMPLETION_FILE,
    OFFSET_DTYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    Corpus,
    load_corpus,
    shard_name,
)
from mohawkify.data.hub import Position, Report, ignore
from mohawkify.data.mixture import is_mixture, merge_sources
from mohawkify.data.sources import RawRow, describe, empty_source, raw_documents, source_identity
from mohawkify.data.tokenize import TOKEN_DTYPE, Encoded, tokenizer_hash
from mohawkify.data.tokenize_workers import Pending, Submit, encoders
from mohawkify.errors import CheckpointError, DataError
from mohawkify.files import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawkify.recipe.schema import Source

_FORMAT_VERSION = 3  # part of the key: to be raised when the same text would give other tokens, or other files
# A shard is what a kill can cost, and ends with the first document that fills it.
_SHARD_TOKENS = 100_000_000
# The fast tokenizers work on a batch in parallel: enough documents to keep them busy, few enough to hold in memory.
_DOCUMENTS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 2_000_000
_BATCHES_AHEAD = 2  # per process
UNFINISHED = ".partial-"  # how the name of a folder with the finished shards of an unfinished corpus begins

Progress = Callable[[int], None]


@dataclass
class SourceProgress:
    """The part of a source that a corpus has so far.

    Args:
        rows: rows of the source up to the last document taken; those that no condition lets through count too.
        stream: what the Hub's stream needs to go on there.
        documents: documents taken.
        tokens: tokens taken.
        completion_tokens: those of them that are completions.
        bad_rows: rows that were passed over because of an error.
        first_error: that of the first of them.
    """

    rows: int = 0
    stream: dict[str, Any] | None = None
    documents: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    bad_rows: int = 0
    first_error: str | None = None


class _Read(NamedTuple):
    """A document as tokens, and the position in its source behind it."""

    encoded: Encoded
    after: Position


@dataclass(frozen=True)
class CorpusRequest:
    """A request for a corpus: its sources and its tokenizer.

    Args:
        sources: read one by one, or mixed where they have weights.
        tokenizer: the teacher's.
        num_tokens: stop here, cutting the last document; None takes all. The text may turn out to be shorter.
        teacher_directory: the teacher's folder, if it has one.
        vocab_size: rows of the teacher's embedding.
        skip_bad_rows: how many rows that cannot be read are passed over, at most.
    """

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase
    num_tokens: int | None
    teacher_directory: Path | None
    vocab_size: int
    skip_bad_rows: int = 0

    @property
    def is_masked(self) -> bool:
        """Whether it makes a difference which tokens are completions."""
        return any(source.chat is not None and source.loss == "completion" for source in self.sources)

    @property
    def most_bytes(self) -> int:
        """The size of its tokens on the disk, if the text is long enough."""
        return (self.num_tokens or 0) * (TOKEN_DTYPE.itemsize + self.is_masked)

    @cached_property
    def key(self) -> str:
        """A hash of sources, files (size and time of change), tokenizer and number of tokens."""
        identity = {
            "version": _FORMAT_VERSION,
            "sources": [source_identity(source, self.teacher_directory) for source in self.sources],
            "tokenizer": tokenizer_hash(self.tokenizer),
            "borders": [self.tokenizer.bos_token, self.tokenizer.eos_token],
            "chat_template": self.tokenizer.chat_template,
            "num_tokens": self.num_tokens,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def build_corpus(
    request: CorpusRequest,
    directory: Path,
    *,
    num_workers: int = 0,
    progress: Progress | None = None,
    report: Report = ignore,
) -> Corpus:
    """Tokenise text, or re-use what an earlier call made of the same text.

    Where documents begin and end is marked by the rule of `encode_documents`. The corpus lies in a folder named by
    `CorpusRequest.key`. What a killed call had finished is kept beside it, shard by shard, and not done again; the
    result is the same bytes as that of one call, and for any number of processes.

    Args:
        request: what it is made of.
        directory: holds corpora, each in a folder of its own.
        num_workers: processes that tokenise; 0 does it here.
        progress: called with the number of tokens so far after every document.
        report: receives a line for every try to reach the Hub again.

    Raises:
        DataError: if there is no text, it cannot be read, or an earlier corpus is damaged.
        StorageError: if the corpus cannot be written.
    """
    if not request.sources:
        raise DataError("no text is given", hint="name a file, folder or dataset under data in the recipe")
    if request.num_tokens is not None and request.num_tokens < 1:
        raise DataError(f"{request.num_tokens} tokens of text are asked for, expected at least 1")
    target = directory / request.key
    work = directory / f"{UNFINISHED}{target.name}"
    if not target.exists():
        for source in request.sources:
            if source.chat is not None:
                require_chat_template(request.tokenizer)
        atomic.sweep_temporaries(directory)
        with encoders(num_workers, request.tokenizer, request.vocab_size) as submit:
            facts = _Work(request, work, report, progress or (lambda num_tokens: None)).finish(
                submit, num_workers * _BATCHES_AHEAD
            )
        with atomic.atomic_directory(target, facts=facts) as folder:
            _link_shards(work, facts["shards"], folder)
    if work.exists():  # also what a killed call left that had come so far
        atomic.remove_directory(work)
    return load_corpus(target, request.vocab_size)


def bytes_to_write(request: CorpusRequest, directory: Path) -> int:
    """The bytes that `build_corpus` has yet to write, if the text is long enough; 0 for a finished corpus."""
    if (directory / request.key).exists():
        return 0
    written = directory.glob(f"{UNFINISHED}{request.key}/shard-*/*.bin")
    return max(0, request.most_bytes - sum(file.stat().st_size for file in written))


class _Work:
    """A corpus in the making.

    Args:
        request: what it is made of.
        folder: holds the finished shards.
        report: receives a line for every try to reach the Hub again.
        progress: called with the number of tokens so far.
    """

    def __init__(self, request: CorpusRequest, folder: Path, report: Report, progress: Progress) -> None:
        self.request, self.folder, self.report, self.progress = request, folder, report, progress
        self.taken = [SourceProgress() for _ in request.sources]
        self.tokens_of = [0 for _ in request.sources]
        self.shards: list[str] = []
        self.borders = array("q", [0])
        self.digest, self.completion_digest = hashlib.sha256(), hashlib.sha256()
        self._pick_up()

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self.borders[-1]

    def finish(self, submit: Submit, ahead: int) -> dict[str, Any]:
        """Write the shards that are missing; returns the facts of the corpus."""
        documents = self._documents(submit, ahead)
        has_ended = False
        while self.num_tokens != self.request.num_tokens and not has_ended:
            first = next(documents, None)
            if first is None:
                has_ended = True
                continue
            facts: dict[str, Any] = {}
            name = shard_name(len(self.shards))
            with atomic.atomic_directory(self.folder / name, facts=facts) as folder:
                _write_shard(self, folder, chain([first], documents))
                facts["taken"] = [asdict(taken) for taken in self.taken]
            self.shards.append(name)
        if self.num_tokens == 0:
            raise DataError("the tokenizer gives not a single token for the text", hint="check text and tokenizer")
        return self._facts(has_ended)

    def take(self, index: int, read: _Read) -> Encoded:
        """Count a document of a source, cut where there is enough, and return what is to be written."""
        left = None if self.request.num_tokens is None else self.request.num_tokens - self.num_tokens
        encoded = Encoded(read.encoded.tokens[:left], read.encoded.completion[:left])
        taken = self.taken[index]
        taken.rows, taken.stream = read.after
        taken.documents += 1
        taken.tokens += len(encoded.tokens)
        taken.completion_tokens += int(encoded.completion.sum())
        self.tokens_of[index] = taken.tokens
        self.borders.append(self.num_tokens + len(encoded.tokens))
        self._hash(encoded.tokens, encoded.completion)
        self.progress(self.num_tokens)
        return encoded

    def _hash(self, tokens: np.ndarray, completion: np.ndarray) -> None:
        self.digest.update(np.ascontiguousarray(tokens).data)
        if self.request.is_masked:
            self.completion_digest.update(np.ascontiguousarray(completion).data)

    def _pick_up(self) -> None:
        """Take the shards that a killed call finished, up to the first that is missing or damaged."""
        if not self.folder.is_dir():
            return
        atomic.sweep_temporaries(self.folder)
        present = sorted(path for path in self.folder.iterdir() if path.name.startswith("shard-"))
        for number, path in enumerate(present):
            try:
                values = atomic.verify_directory(path)["facts"]["taken"]
                found = [SourceProgress(**each) for each in values]
            except (CheckpointError, KeyError, TypeError):
                found = []
            if len(found) != len(self.taken) or path.name != shard_name(number):
                for other in present[number:]:
                    atomic.remove_directory(other)
                break
            borders = np.fromfile(path / OFFSETS_FILE, dtype=OFFSET_DTYPE)[1:] + self.num_tokens
            tokens = np.memmap(path / TOKENS_FILE, dtype=TOKEN_DTYPE, mode="r")
            is_masked = self.request.is_masked
            completion = np.memmap(path / COMPLETION_FILE, dtype=np.uint8, mode="r") if is_masked else tokens
            self._hash(tokens, completion)
            self.borders.frombytes(borders.astype(np.int64).tobytes())
            self.taken = found
            self.tokens_of = [taken.tokens for taken in self.taken]
            self.shards.append(path.name)
        if self.shards:
            self.report(f"going on behind {self.num_tokens:,} tokens that were tokenised before")

    def _documents(self, submit: Submit, ahead: int) -> Iterator[tuple[int, _Read]]:
        streams = [self._read(index, submit, ahead) for index in range(len(self.request.sources))]
        begun = [index for index, taken in enumerate(self.taken) if taken.documents]
        return merge_sources(self.request.sources, streams, self.tokens_of, max(begun, default=0))

    def _read(self, index: int, submit: Submit, ahead: int) -> Iterator[_Read]:
        """Yield the documents of a source, a few batches being tokenised ahead."""
        source, taken = self.request.sources[index], self.taken[index]
        start = Position(taken.rows, taken.stream)
        rows = raw_documents(source, self.request.teacher_directory, start=start, report=self.report)
        found = taken.documents > 0
        waiting: deque[tuple[list[RawRow], Pending]] = deque()
        batches = _batches(rows)
        while True:
            batch = next(batches, None)
            if batch is not None:
                waiting.append((batch, submit(source, batch)))
            if not waiting:
                break
            if batch is not None and len(waiting) <= ahead:
                continue
            read, pending = waiting.popleft()
            for raw, encoded in zip(read, pending(), strict=True):
                if isinstance(encoded, DataError):
                    self._pass_over(taken, encoded)
                    continue
                if encoded is None:
                    continue
                found = True
                if encoded.tokens.size:  # a tokenizer without BOS and EOS may normalise a text away
                    yield _Read(encoded, raw.after)
        if not found:
            raise empty_source(source, taken.bad_rows)

    def _pass_over(self, taken: SourceProgress, error: DataError) -> None:
        """Count a bad row. It is counted behind the document before it, and so again where a kill came in between."""
        taken.bad_rows += 1
        taken.first_error = taken.first_error or error.message
        limit = self.request.skip_bad_rows
        if sum(each.bad_rows for each in self.taken) > limit:
            before = f"; data.skip_bad_rows, {limit:,}, were passed over before it" if limit else ""
            hint = f"{error.hint}; or" if error.hint else "mend the row, or"
            raise DataError(
                error.message + before, hint=f"{hint} pass over so many bad rows: data.skip_bad_rows, a number"
            ) from error

    def _facts(self, has_ended: bool) -> dict[str, Any]:
        borders = np.array(self.borders, dtype=OFFSET_DTYPE)
        self.digest.update(borders.data)
        fingerprint = self.digest.hexdigest()
        if self.request.is_masked:
            both = f"{fingerprint} {self.completion_digest.hexdigest()}"
            fingerprint = hashlib.sha256(both.encode()).hexdigest()
        sources = [
            {"source": describe(source), **asdict(taken)}
            for source, taken in zip(self.request.sources, self.taken, strict=True)
        ]
        completion_tokens = sum(taken.completion_tokens for taken in self.taken)
        return {
            "fingerprint": fingerprint,
            "tokens": self.num_tokens,
            "documents": len(self.borders) - 1,
            "completion_tokens": completion_tokens if self.request.is_masked else None,
            "text_has_ended": has_ended,
            "mixture": is_mixture(self.request.sources),
            "sources": sources,
            "shards": self.shards,
            "tokenizer": tokenizer_hash(self.request.tokenizer),
            "teacher": str(self.request.teacher_directory),
        }


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.value) if isinstance(row.value, str) else len(repr(row.value))
        if len(batch) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_shard(work: _Work, folder: Path, documents: Iterator[tuple[int, _Read]]) -> None:
    """Write documents as they come until the shard is full, there is enough, or the text ends."""
    offsets = array("q", [0])
    completion_file: BinaryIO | None = None
    with (folder / TOKENS_FILE).open("wb") as file:
        try:
            if work.request.is_masked:
                completion_file = (folder / COMPLETION_FILE).open("wb")
            for index, read in documents:
                encoded = work.take(index, read)
                file.write(encoded.tokens.data)
                if completion_file is not None:
                    completion_file.write(encoded.completion.data)
                offsets.append(offsets[-1] + len(encoded.tokens))
                if offsets[-1] >= _SHARD_TOKENS or work.num_tokens == work.request.num_tokens:
                    break
        finally:
            if completion_file is not None:
                completion_file.close()
    (folder / OFFSETS_FILE).write_bytes(np.array(offsets, dtype=OFFSET_DTYPE).data)


def _link_shards(work: Path, names: Sequence[str], folder: Path) -> None:
    """Give the shards a second name in the corpus that is about to appear: nothing is copied, and no kill loses one."""
    for name in names:
        (folder / name).mkdir()
        for file in (work / name).iterdir():
            os.link(file, folder / name / file.name)
