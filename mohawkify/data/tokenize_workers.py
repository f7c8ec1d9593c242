"""Rows to tokens, here or in several processes: the result does not depend on where."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING

from mohawkify.data.hub import BEGINNING
from mohawkify.data.sources import RawRow, to_document
from mohawkify.data.tokenize import Document, Encoded, encode_documents
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawkify.recipe.schema import Source

Outcome = Encoded | DataError | None  # of a row: its tokens, what is wrong with it, or that it is empty
Pending = Callable[[], list[Outcome]]
Submit = Callable[["Source", Sequence[RawRow]], Pending]

_here: dict[str, tuple[PreTrainedTokenizerBase, int]] = {}  # of a worker process


def encode_rows(
    source: Source, rows: Sequence[RawRow], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[Outcome]:
    """What becomes of each row.

    Raises:
        DataError: an id has no row in the embedding.
    """
    read = [_read(row, source, tokenizer) for row in rows]
    documents = [document for document in read if isinstance(document, Document)]
    encoded = iter(encode_documents(documents, tokenizer, vocab_size))
    return [next(encoded) if isinstance(found, Document) else found for found in read]


def _read(row: RawRow, source: Source, tokenizer: PreTrainedTokenizerBase) -> Document | DataError | None:
    try:
        return to_document(row, source, tokenizer)
    except DataError as error:
        return error


@contextmanager
def encoders(num_workers: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[Submit]:
    """Hand out a function that takes rows and returns another, which waits for their tokens.

    Args:
        num_workers: processes that work on it; 0 works in this process, when the tokens are requested.
        tokenizer: the teacher's.
        vocab_size: rows of the teacher's embedding.
    """
    if num_workers == 0:
        yield lambda source, rows: lambda: encode_rows(source, rows, tokenizer, vocab_size)
        return
    # Not forked: this process has threads, and a fork would find their locks taken for ever.
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(tokenizer, vocab_size)
    )

    def submit(source: Source, rows: Sequence[RawRow]) -> Pending:
        future = pool.submit(_encode_there, source, [row._replace(after=BEGINNING) for row in rows])

        def wait() -> list[Outcome]:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that tokenised text was ended from outside",
                    hint="was there too little memory? The same command goes on; fewer --workers take less",
                ) from error

        return wait

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides what it means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _here["tools"] = tokenizer, vocab_size
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_there(source: Source, rows: Sequence[RawRow]) -> list[Outcome]:
    return encode_rows(source, rows, *_here["tools"])
