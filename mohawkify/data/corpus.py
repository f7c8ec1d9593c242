"""A corpus: text tokenised once, kept on disk as a stream of token ids in shards, with the starts of its documents."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mohawkify.data.tokenize import TOKEN_DTYPE
from mohawkify.errors import CheckpointError, DataError, StorageError
from mohawkify.files import atomic

TOKENS_FILE = "tokens.bin"  # little-endian unsigned 32-bit ids, nothing else: it is mapped into memory
OFFSETS_FILE = "offsets.bin"  # little-endian signed 64-bit
COMPLETION_FILE = "completion.bin"  # a byte per token, 0 or 1; only where it makes a difference
OFFSET_DTYPE = np.dtype("<i8")
LARGEST_ID = "largest_id"  # of the facts: counted when the files are checked, never taken from the manifest
_TICK_NANOSECONDS = 2_000_000_000  # the coarsest clock by which file systems note a change
_COUNTS = ("tokens", "documents")
_SOURCE_COUNTS = ("rows", "documents", "tokens")
_TOKENS_AT_ONCE = 1 << 24


class Joined:
    """Arrays of one type, read as if they were one, each where it is."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.parts[0].dtype)

    def __getitem__(self, places: Any) -> Any:
        """A slice, of which nothing is read yet, or the items at an array of places."""
        if isinstance(places, slice):
            start, end, _ = places.indices(len(self))
            pieces = [
                part[max(start - begin, 0) : max(end - begin, 0)]
                for part, begin in zip(self.parts, self.starts, strict=False)
            ]
            held = [piece for piece in pieces if len(piece)]
            return Joined(held) if len(held) > 1 else (held or pieces)[0]
        part_of = np.searchsorted(self.starts, places, side="right") - 1
        found = np.empty(places.shape, dtype=self.parts[0].dtype)
        for number in np.unique(part_of):
            here = part_of == number
            found[here] = self.parts[number][places[here] - self.starts[number]]
        return found


Stream = np.ndarray | Joined


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of many documents, one after the other.

    Args:
        tokens: (num_tokens,) unsigned 32-bit ids.
        offsets: (num_documents + 1,) 64-bit positions where the documents start; the last entry is num_tokens.
        fingerprint: a hash of the stream of tokens, borders and completions.
        completion: (num_tokens,) which tokens are completions, 0 or 1; None for text without them.
        bad_rows: rows that were passed over when it was made.
        first_error: that of the first of them.
    """

    tokens: Stream
    offsets: np.ndarray
    fingerprint: str
    completion: Stream | None = None
    bad_rows: int = 0
    first_error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the token stream."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """How many documents the stream consists of."""
        return len(self.offsets) - 1

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids of each document in turn, (l,) unsigned 32-bit."""
        for start, end in pairwise(self.offsets.tolist()):
            yield np.asarray(self.tokens[start:end])


def load_corpus(folder: Path, vocab_size: int | None = None) -> Corpus:
    """Map a corpus from disk, after looking whether it is as it was written.

    Args:
        folder: the corpus.
        vocab_size: rows of the embedding, which bounds the ids; None checks no bound.

    Raises:
        DataError: a file is missing, extra or changed, or the text is for a larger vocabulary.
    """
    return _mapped(folder, checked_facts, vocab_size)


def verify_corpus(folder: Path) -> Corpus:
    """Map a corpus from disk after hashing every file, whatever was noted before; nothing is written.

    Raises:
        DataError: a file is missing, extra or changed.
    """
    return _mapped(folder, verified_facts, None)


def _mapped(folder: Path, read_facts: Callable[[Path], dict[str, Any]], vocab_size: int | None) -> Corpus:
    try:
        facts = read_facts(folder)
        shards = [folder / name for name in facts["shards"]]
        is_masked = facts["completion_tokens"] is not None
        tokens = [np.memmap(shard / TOKENS_FILE, dtype=TOKEN_DTYPE, mode="r") for shard in shards]
        completion = [np.memmap(shard / COMPLETION_FILE, dtype=np.uint8, mode="r") for shard in shards if is_masked]
        starts = np.cumsum([0, *(len(part) for part in tokens)])
        offsets = [
            np.fromfile(shard / OFFSETS_FILE, dtype=OFFSET_DTYPE)[1:] + start
            for shard, start in zip(shards, starts, strict=False)
        ]
    except (CheckpointError, OSError, ValueError) as error:
        raise DataError(
            f"the tokenised text is damaged: {getattr(error, 'message', error)}",
            hint=f"remove {folder}; it is made again from the text",
        ) from error
    if vocab_size is not None and facts[LARGEST_ID] >= vocab_size:
        raise DataError(
            f"{folder} holds the id {facts[LARGEST_ID]}, but the teacher's vocabulary has {vocab_size} entries",
            hint="it was tokenised for another model: remove it, and it is made again from the text",
        )
    return Corpus(
        _joined(tokens),
        np.concatenate([np.zeros(1, dtype=OFFSET_DTYPE), *offsets]),
        facts["fingerprint"],
        _joined(completion) if is_masked else None,
        sum(source.get("bad_rows", 0) for source in facts["sources"]),
        next((source["first_error"] for source in facts["sources"] if source.get("first_error")), None),
    )


def _joined(parts: list[np.memmap]) -> Stream:
    return parts[0] if len(parts) == 1 else Joined(parts)


def read_note(note: Path) -> tuple[Path, str]:
    """Where a run's tokenised text lies that is not its own, and its fingerprint.

    Raises:
        CheckpointError: the note lacks them.
    """
    noted = atomic.read_json(note)
    match noted:
        case {"folder": str(folder), "fingerprint": str(fingerprint)} if "\0" not in folder:
            return Path(folder), fingerprint
    raise CheckpointError(f"{note} does not say where the tokenised text lies", hint="remove it")


def noted_corpus(note: Path, load: Callable[[Path], Corpus]) -> Corpus:
    """A run's tokenised text that is not its own.

    Args:
        note: names its folder and its fingerprint.
        load: `load_corpus` or `verify_corpus`.

    Raises:
        DataError: it is no longer where it was, is damaged, or is another.
        CheckpointError: the note lacks them.
    """
    folder, fingerprint = read_note(note)
    if not os.path.isdir(folder):  # false also for what no file system takes as a name
        raise DataError(
            f"{note} says that the run's tokenised text lies in {folder}, which is not there",
            hint=f"bring it back; or remove {note}, and it is made again from the text",
        )
    corpus = load(folder)
    if corpus.fingerprint != fingerprint:
        raise DataError(f"{folder} holds other text than when the run began", hint="bring back the text it held")
    return corpus


def hold_out(corpus: Corpus, num_tokens: int) -> tuple[Corpus, Corpus]:
    """Split the end off a corpus: a part to train on, and a held-out part of num_tokens, but at most half of it all.

    Documents stay whole and the held-out part is a little smaller for it, unless that would cost more than half of it,
    as it does where documents are long; then the cut goes through a document.

    Returns:
        The corpus to train on and the held-out corpus.

    Raises:
        DataError: if there is too little text to hold out two tokens.
    """
    size = min(num_tokens, corpus.num_tokens // 2)
    if size < 2:
        raise DataError(
            f"cannot hold out {num_tokens} of {corpus.num_tokens} tokens, expected at least 2 and at most half",
            hint="give more text under data.train, or held-out text of its own under data.validation",
        )
    cut = corpus.num_tokens - size
    next_document = int(corpus.offsets[np.searchsorted(corpus.offsets, cut)])
    if next_document - cut <= size // 2:
        cut = next_document
    return _part(corpus, 0, cut), _part(corpus, cut, corpus.num_tokens)


def _part(corpus: Corpus, start: int, end: int) -> Corpus:
    first, last = np.searchsorted(corpus.offsets, [start, end])
    inner = corpus.offsets[first:last] - start
    # The first offset is 0 also where the cut goes through a document.
    offsets = np.unique(np.concatenate([[0], inner, [end - start]]).astype(OFFSET_DTYPE))
    fingerprint = hashlib.sha256(f"{corpus.fingerprint} {start} {end}".encode()).hexdigest()
    completion = None if corpus.completion is None else corpus.completion[start:end]
    return Corpus(corpus.tokens[start:end], offsets, fingerprint, completion)


def shard_name(number: int) -> str:
    """The folder of a shard; only these names are read; others in a manifest are ignored."""
    return f"shard-{number:05d}"


def checked_facts(folder: Path) -> dict[str, Any]:
    """The facts of a corpus whose every file is as it was written, and the largest of its ids as `LARGEST_ID`.

    Hashing a large corpus takes minutes. So what was hashed is noted beside the folder, with every file's size, times
    of change and place on the disk, and is hashed again only once one of these is another: no program changes a file
    and leaves them all alone. A disk that returns other bytes than were written is not detected;
    `mohawkify doctor` hashes everything.

    A manifest may come from a stranger: its content is compared with the files before it is used.

    Raises:
        CheckpointError: a file is missing, extra or changed, or holds what no corpus does.
    """
    note = folder.parent / f".checked-{folder.name}.json"
    now = time.time_ns()
    # Before the folder is searched: a note in a run can lead to a folder of anything.
    facts = _sound_facts(folder)
    stamps = _stamps(folder)
    with suppress(CheckpointError, StorageError):
        noted = atomic.read_json(note) if note.is_file() else None
        if isinstance(noted, dict) and noted.get("files") == stamps and type(noted.get(LARGEST_ID)) is int:
            return {**facts, LARGEST_ID: noted[LARGEST_ID]}
    facts = verified_facts(folder)
    # A change within the same tick of the clock would go unseen: what is so young is hashed again next time.
    if all(now - stamp[2] > _TICK_NANOSECONDS for stamp in stamps.values()):
        with suppress(StorageError):  # text that lies where this user may only read is hashed every time
            atomic.write_json(note, {"files": stamps, LARGEST_ID: facts[LARGEST_ID]})
    return facts


def verified_facts(folder: Path) -> dict[str, Any]:
    """The result of `checked_facts` without its note; nothing is written.

    Raises:
        CheckpointError: a file is missing, extra or changed, or holds what no corpus does.
    """
    facts = _sound_facts(folder)
    atomic.verify_directory(folder)
    try:
        return {**facts, LARGEST_ID: _largest_id(folder, facts)}
    except (OSError, ValueError) as error:  # files that the manifest does not list, or that hold nothing
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _sound_facts(folder: Path) -> dict[str, Any]:
    try:
        manifest = atomic.read_json(folder / atomic.MANIFEST_NAME)
    except StorageError as error:
        raise CheckpointError(error.message) from error
    facts = manifest.get("facts") if isinstance(manifest, dict) else None
    if not isinstance(facts, dict) or not _are_sound(facts):
        raise CheckpointError(f"{folder / atomic.MANIFEST_NAME} does not say what a corpus holds")
    return facts


def _are_sound(facts: dict[str, Any]) -> bool:
    shards, sources, completions = facts.get("shards"), facts.get("sources"), facts.get("completion_tokens", "none")
    return (
        all(isinstance(facts.get(key), str) for key in ("fingerprint", "tokenizer", "teacher"))
        and all(_is_count(facts.get(key)) for key in _COUNTS)
        and (completions is None or _is_count(completions))
        and isinstance(shards, list)
        and len(shards) > 0
        and shards == [shard_name(number) for number in range(len(shards))]
        and isinstance(sources, list)
        and all(isinstance(source, dict) for source in sources)
        and all(_is_count(source.get(key)) for source in sources for key in _SOURCE_COUNTS)
        and all(_is_count(source.get("bad_rows", 0)) for source in sources)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _largest_id(folder: Path, facts: dict[str, Any]) -> int:
    """The largest token id of a corpus, whose shards must fit each other and the manifest."""
    documents = tokens = completions = largest = 0
    for name in facts["shards"]:
        shard = folder / name
        offsets = np.fromfile(shard / OFFSETS_FILE, dtype=OFFSET_DTYPE)
        size = (shard / TOKENS_FILE).stat().st_size
        borders_fit = len(offsets) > 1 and offsets[0] == 0 and int(offsets[-1]) * TOKEN_DTYPE.itemsize == size
        if not borders_fit or (np.diff(offsets) < 1).any():
            raise CheckpointError(f"{shard} holds borders of documents that do not fit its tokens")
        ids = np.memmap(shard / TOKENS_FILE, dtype=TOKEN_DTYPE, mode="r")
        largest = max(largest, *(int(part.max()) for part in _parts(ids)))
        if facts["completion_tokens"] is not None:
            flags = np.memmap(shard / COMPLETION_FILE, dtype=np.uint8, mode="r")
            if len(flags) != len(ids) or any(part.max() > 1 for part in _parts(flags)):
                raise CheckpointError(f"{shard / COMPLETION_FILE} does not fit the tokens")
            completions += sum(int(part.sum()) for part in _parts(flags))
        documents, tokens = documents + len(offsets) - 1, tokens + len(ids)
    found = (tokens, documents, completions)
    if found != (facts["tokens"], facts["documents"], facts["completion_tokens"] or 0):
        raise CheckpointError(f"{folder} holds {tokens:,} tokens of {documents:,} documents, its manifest says another")
    return largest


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[first : first + _TOKENS_AT_ONCE] for first in range(0, len(values), _TOKENS_AT_ONCE)]


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size, time of change of content, of content or name, and inode of every file below a folder."""
    stamps = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path) / name
            status = file.lstat()
            stamps[file.relative_to(folder).as_posix()] = [
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
            ]
    return dict(sorted(stamps.items()))
