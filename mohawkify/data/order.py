"""The order in which a corpus is read: a pure function of the seed and the place in the run.

It knows nothing of processes, workers, batches or the point where a run was resumed: whoever asks for sample 1234 gets
the same sequence. So all that a checkpoint has to keep is how many samples were used.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def sequence_indices(*, num_sequences: int, seed: int, first: int, count: int) -> np.ndarray:
    """Return which sequences the samples first ... first + count - 1 of a run are.

    Sample g belongs to epoch g // num_sequences. Every epoch reads each sequence once, in an order of its own; a batch
    at the end of an epoch goes on into the next.

    Args:
        num_sequences: sequences in the corpus, at least 1.
        seed: the run's, at least 0.
        first: the first sample, counted from the beginning of the run.
        count: how many samples.

    Returns:
        (count,) int64, each from 0 to num_sequences - 1.
    """
    parts = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, place = divmod(first, num_sequences)
        taken = min(count, num_sequences - place)
        parts.append(_permutation(num_sequences, seed, epoch)[place : place + taken])
        first, count = first + taken, count - taken
    return np.concatenate(parts)


@lru_cache(maxsize=4)  # threads that read ahead may stand before and behind the border of epochs, or of segments
def _permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    # numpy promises that the raw output of a bit generator stays the same for ever, but not what `permutation` makes
    # of it (NEP 19). So the order is that of raw random numbers; two equal 64-bit numbers stay in place.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_sequences)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False  # the cache hands out the same array again
    return permutation
