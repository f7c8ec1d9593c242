"""Rows of cells as aligned text or as Markdown; the first columns hold words, the others numbers."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out rows under headings.

    Args:
        headings: one per column.
        rows: cells as text.
        left: how many columns, from the first, are aligned to the left; the others, to the right, hold numbers.
    """
    widths = _widths(headings, rows)
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(_padded(row, widths, left)).rstrip() for row in (headings, rule, *rows))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, the first column aligned to the left."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (headings, *rows)]
    widths = [max(3, width) for width in _widths(lines[0], lines[1:])]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(_padded(row, widths, 1))} |" for row in (lines[0], rule, *lines[1:]))


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(headings, *rows, strict=True)]


def _padded(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    places = enumerate(zip(row, widths, strict=True))
    return [cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in places]
