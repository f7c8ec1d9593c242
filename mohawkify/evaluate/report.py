"""Results as text."""

from __future__ import annotations

from typing import Any


def markdown_report(results: dict[str, Any]) -> str:
    """A table of the figures after every stage."""
    rows = [f"| {name} | {row['perplexity']:.3f} | {row['kl']:.4f} | {row['top1']:.4f} |" for name, row in results["stages"].items()]
    return "\n".join(["| stage | perplexity | KL | top-1 |", "|---|---|---|---|", *rows, ""])
