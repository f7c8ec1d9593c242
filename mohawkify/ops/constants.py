"""The sizes of what the operators compute at a time, which plans of memory and FLOPs use too. No torch here.

This file travels with students: their scan uses it.
"""

from __future__ import annotations

from math import log2

# Elements of the matrices of scan chunks that are computed at once: what stays in a CPU's cache.
SCAN_GROUP_ELEMENTS = 1 << 18
BAND_ELEMENTS = 1 << 22  # of each matrix of a band; its few temporaries then stay in the tens of megabytes
# Rows of a band. The diagonal tile of a higher one, of which most lies above the diagonal, takes too long.
FEWEST_BAND_ROWS, MOST_BAND_ROWS = 16, 64
LOGITS_CHUNK_ELEMENTS = 1 << 24  # 64 MiB in float32. Measured on CPUs, see docs/log.md


def scan_chunk_length(head_dim: int, state_size: int, length: int) -> int:
    """Tokens of a scan's chunk: the power of two near half of the root of a state's elements, at most the length."""
    chunk_length = min(max(2 ** (round(log2(head_dim * state_size) / 2) - 1), 16), 64)
    return max(min(chunk_length, length), 1)


def scan_group_tokens(batch: int, heads: int, chunk_length: int) -> int:
    """Tokens of the chunks that a scan computes at once."""
    return max(SCAN_GROUP_ELEMENTS // max(batch * heads * chunk_length**2, 1), 1) * chunk_length


def band_rows(batch: int, heads: int, length: int) -> int:
    """Rows of the mixing matrices that exist at a time in stage 1."""
    return min(length, MOST_BAND_ROWS, max(BAND_ELEMENTS // (batch * heads * length), FEWEST_BAND_ROWS))


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits exist at a time in stage 3."""
    return max(1, LOGITS_CHUNK_ELEMENTS // vocab_size)
