"""Several sources as one stream of documents: one by one, or mixed by weight so that each prefix has the shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from mohawkify.recipe.schema import Source

Item = TypeVar("Item")


def is_mixture(sources: Sequence[Source]) -> bool:
    """Whether the sources have weights; a list has them all or none."""
    return all(source.weight is not None for source in sources)


def merge_sources(
    sources: Sequence[Source], streams: Sequence[Iterator[Item]], num_tokens: Sequence[int], first: int
) -> Iterator[tuple[int, Item]]:
    """Yield documents with the index of their source.

    Without weights the sources come one by one, from `first` on. With weights the next document is of the source that
    lags furthest behind its share of `num_tokens`, which the caller keeps up to date (of equals the first): the order
    is the same after an interruption, and no source is further from its share than by one document of each. The first
    source to end ends all, because what follows could not have the proportions.
    """
    if not is_mixture(sources):
        for index in range(first, len(sources)):
            yield from ((index, document) for document in streams[index])
        return
    while True:
        index = min(range(len(sources)), key=lambda i: (num_tokens[i] / (sources[i].weight or 1.0), i))
        try:
            yield index, next(streams[index])
        except StopIteration:
            return
