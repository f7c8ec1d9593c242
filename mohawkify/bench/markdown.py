"""The results of the benchmarks as JSON, Markdown and plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mohawkify.text_tables import markdown_table

Report = Callable[[str], None]


class Bound(Enum):
    """Whether a value should be above or below its bound."""

    AT_LEAST = "at least"
    AT_MOST = "at most"


@dataclass(frozen=True)
class Measure:
    """A promise of speed, memory or error."""

    name: str
    found: float
    side: Bound
    bound: float

    @property
    def hit(self) -> bool:
        """Whether it holds."""
        return self.found >= self.bound if self.side is Bound.AT_LEAST else self.found <= self.bound

    def to_json(self) -> dict[str, Any]:
        """All of it, with the verdict."""
        return {
            "measure": self.name, "found": self.found, "side": self.side.value, "bound": self.bound, "hit": self.hit,
        }  # fmt: skip


def markdown(name: str, found: dict[str, Any]) -> str:
    """A page of what `mohawkify bench NAME` found.

    Args:
        name: ``ops``, ``train`` or ``decode``.
        found: the benchmark's JSON object, with ``machine``.
    """
    on = found["machine"]
    title = (
        f"# bench {name}\n\n{on['date']}, {on['device']}, {on['cpu']}, {on['cores']} cores, {on['threads']} threads, "
        f"load {on['load']}, torch {on['torch']}, Python {on['python']}. Times are medians of rounds in turn; spread "
        "is longest less shortest over the median."
    )
    tables = {"ops": _ops_tables, "train": _train_tables, "decode": _decode_tables}[name](found)
    rows = [
        (m["measure"], f"{m['side']} {m['bound']:g}", f"{m['found']:.3g}", "hit" if m["hit"] else "MISS")
        for m in found["measures"]
    ]
    return "\n\n".join([title, *tables, markdown_table(("measure", "bound", "found", ""), rows)]) + "\n"


def _ops_tables(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["case"],
            row["form"],
            ", ".join(f"{key} {size}" for key, size in row["sizes"].items()),
            f"{row['error']:.1e}",
            _seconds(row.get("seconds")),
            _percent(row.get("spread")),
            "" if row.get("share_of_base") is None else f"{row['share_of_base']:.2f}",
            _megabytes(row.get("peak_bytes")),
        )
        for row in found["rows"]
    ]
    heading = ("operator", "form", "sizes", "error", "time", "spread", "over its base", "memory over inputs")
    return [markdown_table(heading, rows)]


def _train_tables(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["stage"],
            row["form"],
            f"{row['loss']:.5f}",
            f"{row['tokens_per_second']:,.0f}",
            _percent(row["spread"]),
            _megabytes(row["peak_bytes"]),
            ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items()),
            _percent(row["model_flops_utilisation"]),
        )
        for row in found["rows"]
    ]
    note = (
        f"{found['teacher']}, {found['batch']} x {found['length']} tokens a step. MFU is of the "
        f"{found['product_flops_per_second']:.2g} FLOP/s that large products reach here."
    )
    heading = ("stage", "form", "loss", "tokens/s", "spread", "memory over weights", "shares of the time", "MFU")
    return [note, markdown_table(heading, rows)]


def _decode_tables(found: dict[str, Any]) -> list[str]:
    parameters = ", ".join(f"{name} {number:,}" for name, number in found["parameters"].items())
    note = f"Random weights, parameters: {parameters}. Error token by token: {found['error_by_steps']:.1e}."
    return [
        note,
        f"Over batches, {found['generated']} tokens each (timed half way):",
        _decode_table(found["batches"]),
        "Over contexts, one sequence:",
        _decode_table(found["contexts"]),
        "Several sequences at the last context:",
        _decode_table(found["together"]),
    ]


def _decode_table(found: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["model"],
            str(row["batch"]),
            str(row["context"]),
            _megabytes(row["cache_bytes"]),
            row["says"] if "says" in row else f"{row['tokens_per_second']:,.1f}",
            _percent(row.get("spread")),
        )
        for row in found
    ]
    return markdown_table(("model", "batch", "context", "cache", "tokens/s", "spread"), rows)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def curves(name: str, found: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """The plots by file name: label of x, label of y, and points by curve."""
    if name != "decode":
        return {}
    plots = {}
    for figure, axis in (("batches", "batch"), ("contexts", "context")):
        for key, label, unit in (("tokens_per_second", "tokens/s", 1.0), ("cache_bytes", "cache, MB", 1e6)):
            points: dict[str, list[tuple[float, float]]] = {}
            for row in found[figure]:
                if key in row:
                    points.setdefault(row["model"], []).append((row[axis], row[key] / unit))
            plots[f"{figure}-{key}"] = (axis, label, points)
    return plots
