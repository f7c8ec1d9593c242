"""Packed batches: a corpus cut into sequences of one length, document borders given by positions that start again at 0.

Shapes: b batch, l length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mohawkify.data.corpus import Corpus
from mohawkify.errors import DataError


class Batch(NamedTuple):
    """A batch of packed sequences.

    Args:
        input_ids: (b, l) int64 token ids.
        position_ids: (b, l) int64 distance to the start of the token's document or, where that lies before the
            sequence, of the sequence. A 0 marks a border: attention and mixers do not cross it.
        loss_mask: (b, l) bool, whether stage 3 counts the prediction made at a token, which is of the next one.
        sequences: (b,) int64 numbers of the sequences within their corpus; empty where they are of none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    sequences: torch.Tensor = torch.empty(0, dtype=torch.int64)


def document_mask(position_ids_bl: torch.Tensor) -> torch.Tensor:
    """The mask of attention (b, 1, l, l): true for earlier tokens of the same document and the token itself."""
    document_bl = (position_ids_bl == 0).cumsum(-1)
    same_bll = document_bl.unsqueeze(-1) == document_bl.unsqueeze(-2)
    return same_bll.tril().unsqueeze(1)


def num_sequences(corpus: Corpus, sequence_length: int) -> int:
    """Count the whole sequences of a corpus; the tokens after the last one are not used.

    Raises:
        DataError: if there is not even one.
    """
    count = corpus.num_tokens // sequence_length
    if count == 0:
        raise DataError(
            f"the text has {corpus.num_tokens} tokens, expected at least one sequence of {sequence_length}",
            hint="give more text under data, or a smaller sequence_length",
        )
    return count


def packed_batch(corpus: Corpus, sequence_length: int, indices: np.ndarray) -> Batch:
    """Gather sequences of a corpus; sequence i holds the tokens from i * sequence_length on.

    Args:
        corpus: the tokens.
        sequence_length: l, tokens per sequence.
        indices: (b,) numbers of the sequences, each below `num_sequences`.
    """
    starts_b1 = np.asarray(indices, dtype=np.int64)[:, None] * sequence_length
    places_bl = starts_b1 + np.arange(sequence_length)
    document_bl = np.searchsorted(corpus.offsets, places_bl, side="right") - 1
    document_start_bl = corpus.offsets[document_bl]
    position_bl = places_bl - np.maximum(document_start_bl, starts_b1)
    input_ids_bl = corpus.tokens[places_bl].astype(np.int64)
    return Batch(
        torch.from_numpy(input_ids_bl),
        torch.from_numpy(position_bl),
        torch.from_numpy(_counts(corpus, places_bl, position_bl)),
        torch.from_numpy(np.array(indices, dtype=np.int64)),
    )


def _counts(corpus: Corpus, places_bl: np.ndarray, position_bl: np.ndarray) -> np.ndarray:
    """Which predictions count: all, or where it makes a difference those of completions in the same sequence."""
    if corpus.completion is None:
        return np.ones(places_bl.shape, dtype=bool)
    counts_bl = np.zeros(places_bl.shape, dtype=bool)
    counts_bl[:, :-1] = corpus.completion[places_bl[:, 1:]].astype(bool) & (position_bl[:, 1:] > 0)
    return counts_bl
