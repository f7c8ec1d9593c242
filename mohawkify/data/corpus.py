"""A corpus: text tokenised once, kept on disk as one flat stream of token ids with the starts of its documents."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mohawkify import storage
from mohawkify.data.encoding import TOKEN_DTYPE, encode_documents, tokenizer_hash
from mohawkify.data.sources import documents, source_identity
from mohawkify.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawkify.recipe import Source

_TOKENS_FILE = "tokens.bin"  # little-endian unsigned 32-bit ids, nothing else: it is mapped into memory
_OFFSETS_FILE = "offsets.bin"  # little-endian signed 64-bit
_OFFSET_DTYPE = np.dtype("<i8")
_FORMAT_VERSION = 1  # part of the key: to be raised when the same text would give other tokens


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of many documents, one after the other.

    Args:
        tokens: (num_tokens,) unsigned 32-bit ids.
        offsets: (num_documents + 1,) 64-bit positions where the documents start; the last entry is num_tokens.
        fingerprint: a hash that tells this stream of tokens and borders from any other.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str

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
        for start, end in pairwise(self.offsets):
            yield self.tokens[start:end]


def build_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    directory: Path,
    num_tokens: int | None,
    teacher_directory: Path | None,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Tokenise the sources one after the other, or re-use what an earlier call made of the same text.

    Where documents begin and end is marked by the rule of `encode_documents`. The corpus lies in a folder named by a
    hash of sources, files (size and time of change), tokenizer and number of tokens.

    Args:
        sources: read in order.
        tokenizer: the teacher's.
        directory: holds the corpora of a run, each in a folder of its own.
        num_tokens: stop here, cutting the last document; None takes all. The text may turn out to be shorter.
        teacher_directory: the teacher's folder, if it has one.
        vocab_size: rows of the teacher's embedding.
        progress: called with the number of tokens so far after every document.

    Raises:
        DataError: if there is no text, it cannot be read, or an earlier corpus is damaged.
        StorageError: if the corpus cannot be written.
    """
    if not sources:
        raise DataError("no text is given", hint="name a file, folder or dataset under data in the recipe")
    if num_tokens is not None and num_tokens < 1:
        raise DataError(f"{num_tokens} tokens of text are asked for, expected at least 1")
    target = directory / _key(sources, tokenizer, num_tokens, teacher_directory)
    if not target.exists():
        storage.sweep_temporaries(directory)
        texts = (text for source in sources for text in documents(source, tokenizer, teacher_directory))
        facts: dict[str, str] = {}
        with storage.atomic_directory(target, facts=facts) as folder:
            facts["fingerprint"] = _write(folder, encode_documents(texts, tokenizer, vocab_size), num_tokens, progress)
    return _load(target)


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
    offsets = np.unique(np.concatenate([[0], inner, [end - start]]).astype(_OFFSET_DTYPE))
    fingerprint = hashlib.sha256(f"{corpus.fingerprint} {start} {end}".encode()).hexdigest()
    return Corpus(corpus.tokens[start:end], offsets, fingerprint)


def _key(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None,
    teacher_directory: Path | None,
) -> str:
    identity = {
        "version": _FORMAT_VERSION,
        "sources": [source_identity(source, teacher_directory) for source in sources],
        "tokenizer": tokenizer_hash(tokenizer),
        "borders": [tokenizer.bos_token, tokenizer.eos_token],
        "chat_template": tokenizer.chat_template,
        "num_tokens": num_tokens,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    folder: Path, encoded: Iterable[np.ndarray], num_tokens: int | None, progress: Callable[[int], None] | None
) -> str:
    """Write tokens and offsets as they come and return their fingerprint."""
    digest = hashlib.sha256()
    offsets = array("q", [0])
    with (folder / _TOKENS_FILE).open("wb") as file:
        for tokens in encoded:
            kept = tokens if num_tokens is None else tokens[: num_tokens - offsets[-1]]
            digest.update(kept.data)
            file.write(kept.data)
            offsets.append(offsets[-1] + len(kept))
            if progress is not None:
                progress(offsets[-1])
            if offsets[-1] == num_tokens:
                break
    if offsets[-1] == 0:
        raise DataError("the tokenizer gives not a single token for the text", hint="check text and tokenizer")
    borders = np.array(offsets, dtype=_OFFSET_DTYPE)
    digest.update(borders.data)
    (folder / _OFFSETS_FILE).write_bytes(borders.data)
    return digest.hexdigest()


def _load(folder: Path) -> Corpus:
    try:
        facts = storage.verify_directory(folder)["facts"]
    except CheckpointError as error:
        raise DataError(
            f"the tokenised text is damaged: {error.message}",
            hint=f"remove {folder}; it is made again from the text",
        ) from error
    tokens = np.memmap(folder / _TOKENS_FILE, dtype=TOKEN_DTYPE, mode="r")
    return Corpus(tokens, np.fromfile(folder / _OFFSETS_FILE, dtype=_OFFSET_DTYPE), facts["fingerprint"])
