"""Order, packing and evaluation rows: what a model is given, against slow and obvious references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mohawkify.data.corpus import Corpus
from mohawkify.data.loader import sequence_indices
from mohawkify.data.packing import num_sequences, packed_batch
from mohawkify.data.validation import evaluation_batches, evaluation_rows
from mohawkify.errors import DataError


def by_lengths(*lengths: int) -> Corpus:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = np.random.default_rng(0).integers(1, 2**32 - 1, size=offsets[-1], dtype=np.uint32)
    return Corpus(tokens, offsets, "made up")


# --- order ----------------------------------------------------------------------------------------------------------


def order(first: int, count: int, *, num: int = 13, seed: int = 5) -> list[int]:
    return sequence_indices(num_blocks=num, seed=seed, first=first, count=count).tolist()


@pytest.mark.parametrize("num", [1, 2, 13, 1000])
def test_every_epoch_is_a_permutation(num: int) -> None:
    for epoch in range(3):
        assert sorted(order(epoch * num, num, num=num)) == list(range(num))


def test_epochs_and_seeds_differ() -> None:
    whole = [tuple(order(epoch * 50, 50, num=50, seed=seed)) for epoch in range(4) for seed in range(4)]
    assert len(set(whole)) == 16


def test_order_is_the_same_wherever_it_is_split() -> None:
    whole = order(0, 60)
    for first in range(60):
        for count in range(60 - first):
            assert order(first, count) == whole[first : first + count]


@pytest.mark.parametrize("batch", [1, 4, 13, 30])
def test_order_is_independent_of_batches_and_ranks(batch: int) -> None:
    whole = order(0, 120)
    assert [index for start in range(0, 120, batch) for index in order(start, min(batch, 120 - start))] == whole
    for ranks in (1, 2, 4):
        share = 4 // ranks
        starts = [step * 4 + rank * share for step in range(30) for rank in range(ranks)]
        assert [index for start in starts for index in order(start, share)] == whole


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_shorter_sequences_are_cut_out_of_the_same_order(pieces: int) -> None:
    blocks = order(0, 40)
    cut = [pieces * block + piece for block in blocks for piece in range(pieces)]
    for first, count in ((0, 40 * pieces), (3, 17), (13 * pieces - 1, 2), (7, 0)):
        found = sequence_indices(num_blocks=13, sequences_per_block=pieces, seed=5, first=first, count=count)
        assert found.tolist() == cut[first : first + count]


def test_order_is_pure_and_the_caller_owns_the_result() -> None:
    first = sequence_indices(num_blocks=13, seed=5, first=3, count=5)
    kept = first.tolist()
    first[:] = 0
    order(0, 500, seed=6)  # other epochs and seeds push the permutation out of the cache
    assert order(3, 5) == kept


def test_order_never_changes() -> None:
    """A run made with an older version continues with the same text: these numbers may not change."""
    assert order(10, 8) == [0, 1, 9, 7, 6, 12, 1, 8]
    assert sequence_indices(num_blocks=13, seed=5, first=0, count=0).dtype == np.int64


# --- packing --------------------------------------------------------------------------------------------------------


def slow_rows(corpus: Corpus, length: int) -> list[tuple[list[int], list[int]]]:
    """Walk through the corpus token by token."""
    starts = set(corpus.offsets.tolist())
    rows = []
    ids: list[int] = []
    positions: list[int] = []
    for place, token in enumerate(corpus.tokens.tolist()):
        positions.append(0 if place in starts or not positions else positions[-1] + 1)
        ids.append(token)
        if len(ids) == length:
            rows.append((ids, positions))
            ids, positions = [], []
    return rows


@pytest.mark.parametrize("length", [2, 5, 8, 16, 63])
@pytest.mark.parametrize(
    "lengths",
    [(63,), (1,) * 70, (5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 3), (1, 7, 2, 30, 1, 1, 9, 40), (64, 64)],
    ids=str,
)
def test_packing_equals_a_slow_walk(lengths: tuple[int, ...], length: int) -> None:
    corpus = by_lengths(*lengths)
    expected = slow_rows(corpus, length)
    assert num_sequences(corpus, length) == len(expected)
    order = np.random.default_rng(1).permutation(len(expected))
    batch = packed_batch(corpus, length, order)
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.input_ids.tolist() == [expected[index][0] for index in order]
    assert batch.position_ids.tolist() == [expected[index][1] for index in order]


def test_text_shorter_than_a_sequence() -> None:
    assert num_sequences(by_lengths(3, 5), 8) == 1
    with pytest.raises(DataError, match="the text has 8 tokens, expected at least one sequence of 9"):
        num_sequences(by_lengths(3, 5), 9)


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "sequence_length", "num_tokens", "expected"),
    [
        ((3, 4, 1, 2), 8, 100, [3, 4, 2]),  # a single token predicts nothing
        ((10,), 4, 100, [4, 4, 2]),
        ((9, 3), 4, 100, [4, 4, 3]),
        ((5, 5, 5), 8, 12, [5, 5, 2]),
        ((5, 5, 5), 8, 11, [5, 5]),
        ((20,), 4, 9, [4, 4]),
        ((5, 5), 8, 10, [5, 5]),
        ((5, 5), 8, 0, []),
    ],
)
def test_evaluation_rows(lengths: tuple[int, ...], sequence_length: int, num_tokens: int, expected: list[int]) -> None:
    corpus = by_lengths(*lengths)
    rows = evaluation_rows(corpus, sequence_length=sequence_length, num_tokens=num_tokens)
    assert [len(row) for row in rows] == expected
    for row in rows:
        (place,) = np.flatnonzero(corpus.tokens == row[0])
        np.testing.assert_array_equal(row, corpus.tokens[place : place + len(row)])
        start = corpus.offsets[np.searchsorted(corpus.offsets, place, side="right") - 1]
        assert (place - start) % sequence_length == 0
        assert np.searchsorted(corpus.offsets, place + len(row)) == np.searchsorted(corpus.offsets, place + 1)


def test_evaluation_batches_hold_every_row_once() -> None:
    rows = [np.arange(100 * n, 100 * n + length, dtype=np.uint32) for n, length in enumerate([3, 7, 2, 7, 5], start=1)]
    batches = list(evaluation_batches(rows, 2))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 7), (2, 5), (1, 2)]
    found = []
    for batch in batches:
        assert batch.input_ids.dtype == torch.int64
        assert batch.valid.dtype == torch.bool
        assert (batch.input_ids[~batch.valid] == 0).all()
        # Real tokens stand on the left.
        assert (batch.valid.int().diff(dim=1) <= 0).all()
        found += [ids[valid].tolist() for ids, valid in zip(batch.input_ids, batch.valid, strict=True)]
    assert found == [rows[number].tolist() for number in (1, 3, 4, 0, 2)]
