"""The batches of a stage, a pure function of seed and step, read ahead by threads.

The order in which a corpus is read does not depend on processes, workers, batches or the step where a run was resumed:
sample 1234 is always the same sequence. So a checkpoint keeps nothing but the number of steps taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mohawkify.data.corpus import Corpus
from mohawkify.data.packing import Batch, num_sequences, packed_batch

_BATCHES_AHEAD = 2  # per thread


@dataclass(frozen=True)
class SampleRange:
    """Consecutive steps over one corpus at one length.

    Args:
        corpus: the tokens.
        num_steps: optimiser steps.
        sequence_length: tokens per sequence.
        first_sequence: place in the corpus's global order where the range begins; earlier stages used what is before.
        sequences_per_block: how many neighbouring sequences are shuffled as one.
    """

    corpus: Corpus
    num_steps: int
    sequence_length: int
    first_sequence: int
    sequences_per_block: int = 1

    def indices(self, first: int, count: int, seed: int) -> np.ndarray:
        """Which sequences of the corpus some samples of the range are: (count,) int64."""
        return sequence_indices(
            num_blocks=num_sequences(self.corpus, self.sequences_per_block * self.sequence_length),
            sequences_per_block=self.sequences_per_block,
            seed=seed,
            first=self.first_sequence + first,
            count=count,
        )


def sequence_indices(*, num_blocks: int, sequences_per_block: int = 1, seed: int, first: int, count: int) -> np.ndarray:
    """The sequences of the samples first ... first + count - 1 of a run.

    Blocks of neighbouring sequences are shuffled: stages of several lengths share one order if a block is as long for
    all of them. Epoch 0 reads each block once, in an order of its own, then epoch 1; a batch at the end of an
    epoch goes on into the next.

    Args:
        num_blocks: blocks in the corpus, at least 1.
        sequences_per_block: how many sequences each block holds, which are read one after the other.
        seed: the run's, at least 0.
        first: the first sample, counted from the beginning of the run.
        count: how many samples.

    Returns:
        (count,) int64, each from 0 to num_blocks * sequences_per_block - 1.
    """
    blocks, pieces = np.divmod(np.arange(first, first + count, dtype=np.int64), sequences_per_block)
    parts = [np.empty(0, dtype=np.int64)]
    for epoch in np.unique(blocks // num_blocks):
        positions = blocks[blocks // num_blocks == epoch] % num_blocks
        parts.append(_permutation(num_blocks, seed, int(epoch))[positions])
    return np.concatenate(parts) * sequences_per_block + pieces


@lru_cache(maxsize=4)  # threads may read on both sides of a border of epochs or segments
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    # numpy guarantees the raw output of a bit generator for ever, but not that of `permutation` (NEP 19). So the order
    # is that of raw random values; two equal 64-bit values stay in place.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_blocks)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False  # the cache returns the same array again
    return permutation


def sequences_of(sample_range: SampleRange, batch_sequences: int, seed: int) -> np.ndarray:
    """Which sequences of its corpus a range reads: (n,) int64, sorted, each once."""
    return np.unique(sample_range.indices(0, sample_range.num_steps * batch_sequences, seed))


def batch_at(ranges: Sequence[SampleRange], step: int, batch_sequences: int, seed: int) -> Batch:
    """The batch of a step: a pure function of its arguments.

    Args:
        ranges: what the stage reads, in order.
        step: the step within the stage, from 0.
        batch_sequences: b, sequences per step.
        seed: the run's.

    Raises:
        IndexError: the step is beyond the last range.
    """
    for sample_range in ranges:
        if step < sample_range.num_steps:
            indices = sample_range.indices(step * batch_sequences, batch_sequences, seed)
            return packed_batch(sample_range.corpus, sample_range.sequence_length, indices)
        step -= sample_range.num_steps
    raise IndexError("the step is beyond the stage's end")


def read_batches(
    ranges: Sequence[SampleRange], *, batch_sequences: int, seed: int, first_step: int, num_workers: int
) -> Generator[Batch]:
    """Yield the batches of a stage from a step to its end; neither that step nor the threads change what they hold.

    Args:
        ranges: what the stage reads, in order.
        batch_sequences: b, sequences per step.
        seed: the run's.
        first_step: steps already taken.
        num_workers: threads that read ahead, until the generator is closed; 0 reads each batch when it is requested.
    """
    num_steps = sum(sample_range.num_steps for sample_range in ranges)
    if num_workers == 0:
        for step in range(first_step, num_steps):
            yield batch_at(ranges, step, batch_sequences, seed)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    waiting: deque[Future[Batch]] = deque()
    try:
        for step in range(first_step, num_steps):
            waiting.append(pool.submit(batch_at, ranges, step, batch_sequences, seed))
            if len(waiting) > num_workers * _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
