"""Several sources as one stream of documents: one by one, or mixed by weight so that each prefix has the shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from mohawkify.recipe.schema import Source

Sized = TypeVar("Sized")


def next_source(sources: Sequence[Source], num_tokens: Sequence[int]) -> int:
    """The source of a mixture that lags furthest behind its share of the tokens so far; of equals the first.

    It knows nothing but the tokens taken so far: a mixture that is read on has the order of one read in one go, and no
    source is ever further from its share than by one document of each.
    """
    return min(range(len(sources)), key=lambda index: (num_tokens[index] / (sources[index].weight or 1.0), index))


def is_mixture(sources: Sequence[Source]) -> bool:
    """Whether the sources have weights; a list has them all or none."""
    return all(source.weight is not None for source in sources)


def take_turns(
    sources: Sequence[Source], streams: Sequence[Iterator[Sized]], num_tokens: Sequence[int], first: int
) -> Iterator[tuple[int, Sized]]:
    """Yield documents with the index of their source.

    Without weights the sources come one by one. With weights they alternate, and the end of the first one to end is the
    end of all: what follows could not have the proportions.

    Args:
        sources: in the recipe's order.
        streams: their documents.
        num_tokens: tokens taken of each so far; the caller keeps it up to date.
        first: where sources come one by one, the one to begin with.
    """
    if not is_mixture(sources):
        for index in range(first, len(sources)):
            for document in streams[index]:
                yield index, document
        return
    while True:
        index = next_source(sources, num_tokens)
        try:
            yield index, next(streams[index])
        except StopIteration:
            return
