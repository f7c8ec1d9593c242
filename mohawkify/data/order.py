"""The order in which a corpus is read: a pure function of the seed and the place in the run.

It does not depend on processes, workers, batches or the step where a run was resumed: sample 1234 is always
the same sequence. So all that a checkpoint has to keep is how many samples were used.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def sequence_indices(*, num_blocks: int, sequences_per_block: int = 1, seed: int, first: int, count: int) -> np.ndarray:
    """Return which sequences the samples first ... first + count - 1 of a run are.

    What is shuffled are blocks of neighbouring sequences: stages of several lengths share one order if a block is as
    long for all of them. Epoch 0 reads each block once, in an order of its own, then epoch 1; a batch at the end of an
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
        places = blocks[blocks // num_blocks == epoch] % num_blocks
        parts.append(_permutation(num_blocks, seed, int(epoch))[places])
    return np.concatenate(parts) * sequences_per_block + pieces


@lru_cache(maxsize=4)  # threads that read ahead may stand before and behind the border of epochs, or of segments
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    # numpy promises that the raw output of a bit generator stays the same for ever, but not what `permutation` makes
    # of it (NEP 19). So the order is that of raw random numbers; two equal 64-bit numbers stay in place.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_blocks)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False  # the cache hands out the same array again
    return permutation
