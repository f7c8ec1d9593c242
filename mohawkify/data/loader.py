"""What a stage reads, batch after batch: a pure function of seed and step, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mohawkify.data.corpus import Corpus
from mohawkify.data.order import sequence_indices
from mohawkify.data.packing import Batch, num_sequences, packed_batch

_BATCHES_AHEAD = 2  # per thread


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps over one corpus at one length.

    Args:
        corpus: the tokens.
        num_steps: optimiser steps.
        sequence_length: tokens per sequence.
        first_sequence: place in the corpus's global order where the stretch begins; earlier stages used what is before.
        sequences_per_block: how many neighbouring sequences are shuffled as one.
    """

    corpus: Corpus
    num_steps: int
    sequence_length: int
    first_sequence: int
    sequences_per_block: int = 1

    def indices(self, first: int, count: int, seed: int) -> np.ndarray:
        """Which sequences of the corpus some samples of the stretch are: (count,) int64."""
        return sequence_indices(
            num_blocks=num_sequences(self.corpus, self.sequences_per_block * self.sequence_length),
            sequences_per_block=self.sequences_per_block,
            seed=seed,
            first=self.first_sequence + first,
            count=count,
        )


def sequences_of(stretch: Stretch, batch_sequences: int, seed: int) -> np.ndarray:
    """Which sequences of its corpus a stretch reads: (n,) int64, sorted, each once."""
    return np.unique(stretch.indices(0, stretch.num_steps * batch_sequences, seed))


def batch_at(stretches: Sequence[Stretch], step: int, batch_sequences: int, seed: int) -> Batch:
    """The batch of a step: a pure function of its arguments.

    Args:
        stretches: what the stage reads, in order.
        step: the step within the stage, from 0.
        batch_sequences: b, sequences per step.
        seed: the run's.

    Raises:
        IndexError: the step is beyond the last stretch.
    """
    for stretch in stretches:
        if step < stretch.num_steps:
            indices = stretch.indices(step * batch_sequences, batch_sequences, seed)
            return packed_batch(stretch.corpus, stretch.sequence_length, indices)
        step -= stretch.num_steps
    raise IndexError("the step is beyond the stage's end")


def read_batches(
    stretches: Sequence[Stretch], *, batch_sequences: int, seed: int, first_step: int, num_workers: int
) -> Generator[Batch]:
    """Yield the batches of a stage from a step to its end; neither that step nor the threads change what they hold.

    Args:
        stretches: what the stage reads, in order.
        batch_sequences: b, sequences per step.
        seed: the run's.
        first_step: steps already taken.
        num_workers: threads that read ahead, until the generator is closed; 0 reads each batch when it is asked for.
    """
    num_steps = sum(stretch.num_steps for stretch in stretches)
    if num_workers == 0:
        for step in range(first_step, num_steps):
            yield batch_at(stretches, step, batch_sequences, seed)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    waiting: deque[Future[Batch]] = deque()
    try:
        for step in range(first_step, num_steps):
            waiting.append(pool.submit(batch_at, stretches, step, batch_sequences, seed))
            if len(waiting) > num_workers * _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
