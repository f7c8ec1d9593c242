"""Held-out text for measurements: documents one by one, never packed, in right-padded batches.

Shapes: b batch, l length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mohawkify.data.corpus import Corpus

_PAD_ID = 0  # any id: causal models ignore tokens to the right, and `valid` excludes it
_SHORTEST_ROW = 2  # a single token has no next token to predict


class EvaluationBatch(NamedTuple):
    """A batch of documents, or windows of them.

    Args:
        input_ids: (b, l) int64 token ids, padded on the right.
        valid: (b, l) bool, true where a token is real.
    """

    input_ids: torch.Tensor
    valid: torch.Tensor


def evaluation_rows(corpus: Corpus, *, sequence_length: int, num_tokens: int) -> list[np.ndarray]:
    """Cut the documents of a corpus into rows.

    A document longer than sequence_length gives several rows that do not overlap. Rows of a single token are dropped.

    Args:
        corpus: held-out text; each document begins with BOS where the tokenizer has one.
        sequence_length: the longest row.
        num_tokens: where to stop; the last row is cut to fit.

    Returns:
        Arrays (l,) of unsigned 32-bit ids with 2 <= l <= sequence_length, in the corpus's order.
    """
    rows: list[np.ndarray] = []
    wanted = num_tokens
    for document in corpus.documents():
        for start in range(0, len(document), sequence_length):
            row = document[start : min(start + sequence_length, start + wanted)]
            if len(row) >= _SHORTEST_ROW:
                rows.append(row)
                wanted -= len(row)
        if wanted < _SHORTEST_ROW:
            break
    return rows


def first_rows(rows: Sequence[np.ndarray], num_tokens: int) -> list[np.ndarray]:
    """The first rows with that many tokens in all, and the first one in any case."""
    kept: list[np.ndarray] = []
    total = 0
    for row in rows:
        total += len(row)
        if kept and total > num_tokens:
            break
        kept.append(row)
    return kept


def evaluation_batches(rows: Sequence[np.ndarray], batch_size: int) -> Iterator[EvaluationBatch]:
    """Batch rows of similar length, the longest first, so that a batch too large for the memory fails at once.

    Args:
        rows: arrays (l,) of token ids.
        batch_size: rows per batch; the last one may be smaller.
    """
    by_length = sorted(rows, key=len, reverse=True)
    for first in range(0, len(by_length), batch_size):
        batch = by_length[first : first + batch_size]
        length = len(batch[0])
        input_ids = torch.full((len(batch), length), _PAD_ID, dtype=torch.int64)
        valid = torch.zeros((len(batch), length), dtype=torch.bool)
        for number, row in enumerate(batch):
            input_ids[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
            valid[number, : len(row)] = True
        yield EvaluationBatch(input_ids, valid)
