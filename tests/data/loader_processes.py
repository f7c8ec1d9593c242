"""Prints the hash of the token stream that real processes read, for every number of them, of threads, and every stop.

The processes are forked from this one, which has nothing but imports behind it; they share nothing afterwards.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from itertools import islice

from mohawkify.data.loader import SampleRange, read_batches
from tests.data.test_loader import BATCH, WORKERS, WORLDS, make_stretches, resume_points, total

Stream = list[list[bytes]]  # of every batch every tensor


def read_share(world: int, rank: int) -> dict[str, Stream]:
    """What one of several processes reads, its rows of every batch: the stream for each number of threads and stop."""
    ranges = make_stretches()
    stops = [[point] for point in resume_points(ranges)] + [resume_points(ranges)]
    return {
        f"{world} processes, {num_workers} threads, stopped after {some}": _rows(ranges, world, rank, num_workers, some)
        for num_workers in WORKERS
        for some in stops
    }


def _rows(ranges: list[SampleRange], world: int, rank: int, num_workers: int, stops: list[int]) -> Stream:
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found = []
    for start, stop in zip([0, *stops], [*stops, total(ranges)], strict=True):
        batches = read_batches(ranges, batch_sequences=BATCH, seed=5, first_step=start, num_workers=num_workers)
        for batch in islice(batches, stop - start):
            found.append([tensor[mine].contiguous().numpy().tobytes() for tensor in batch])
    return found


def digest_of(shares: list[Stream]) -> str:
    """The hash of whole batches, put together from the rows of all processes."""
    digest = hashlib.sha256()
    for parts in zip(*shares, strict=True):
        for tensors in zip(*parts, strict=True):
            digest.update(b"".join(tensors))
    return digest.hexdigest()


def main() -> None:
    """Start the processes, all at once, and put together what they read."""
    places = [(world, rank) for world in WORLDS for rank in range(world)]
    with multiprocessing.get_context("fork").Pool(len(places), maxtasksperchild=1) as pool:
        shares = pool.starmap(read_share, places, chunksize=1)
    digests = {}
    for world in WORLDS:
        ranks = [share for place, share in zip(places, shares, strict=True) if place[0] == world]
        digests |= {name: digest_of([share[name] for share in ranks]) for name in ranks[0]}
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
