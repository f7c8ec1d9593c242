"""Which families the slow tests of `make test` run on; `make test-all` runs them on all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# Layouts that differ: fused and separate projections, masks, norms, windows, caps, positions and experts.
REPRESENTATIVES = {
    "cohere2": "attention beside the MLP, windows, a scale of the logits",
    "falcon": "one fused matrix, its own capture, document borders in a mask",
    "gemma2": "norms behind the blocks, capped logits, windows",
    "gpt2": "learned positions, transposed weights, biases, a head per key",
    "llama": "grouped key heads, stretched rotations, a tied head",
    "mpt": "ALiBi, clipped values, its own names of sizes",
    "qwen3_moe": "experts, norms of queries and keys",
}


def each_family(names: Iterable[str], *values: Any) -> list[Any]:
    """Parameters of a slow test, one per family; those beyond the representatives are marked `full`."""
    return [pytest.param(name, *values, marks=[] if name in REPRESENTATIVES else pytest.mark.full) for name in names]
