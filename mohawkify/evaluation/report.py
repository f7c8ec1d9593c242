"""The metrics of a run as tables, for a terminal and for Markdown. Reads the plain dictionary of results.json."""

from __future__ import annotations

import math
from textwrap import indent
from typing import Any, NamedTuple

from mohawkify.text_tables import markdown_table, text_table

_MISSING = "-"


class _Table(NamedTuple):
    """A titled table; the first column holds names, the others metrics, and a missing metric is None."""

    title: str
    header: list[str]
    rows: list[list[str | None]]


def console_table(results: dict[str, Any]) -> str:
    """Lay out a run's results in aligned columns; parts that were not measured are left out.

    Args:
        results: as in results.json: ``teacher``, ``student``, ``stages``, and optionally ``tasks`` (of
            `mohawkify.evaluation.harness.run_tasks`), ``speed`` and ``sizes`` (texts by name).
    """
    return "\n\n".join("\n".join([table.title, indent(text_table(*_cells(table)), "  ")]) for table in _tables(results))


def markdown_report(results: dict[str, Any]) -> str:
    """Write a run's results as a Markdown page; takes what `console_table` takes."""
    title = f"# Results of {results['name']}" if "name" in results else "# Results"
    tables = [f"## {table.title}\n\n{markdown_table(*_cells(table))}" for table in _tables(results)]
    return "\n\n".join([title, *tables]) + "\n"


def _tables(results: dict[str, Any]) -> list[_Table]:
    training = [_agreement_table(results), _phases_table(results)]
    tables = [*training, _tasks_table(results), _speed_table(results), _sizes_table(results)]
    return [table for table in tables if table.rows]


def _agreement_table(results: dict[str, Any]) -> _Table:
    teacher = results.get("teacher") or {}
    stages = results.get("stages") or {}
    measured = {"teacher": teacher}
    measured |= {f"after {name}": row for name, row in stages.items()}
    measured["student"] = results.get("student") or {}
    title = "Held-out text"
    if results.get("evaluation_tokens"):
        title += f" ({results['evaluation_tokens']:,} predicted tokens)"
    header = ["", "tokens", "perplexity", "x teacher", "KL (nats/token)", "top-1", "seconds"]
    rows = [
        [
            name,
            _count(metrics.get("tokens")),
            _significant(metrics.get("perplexity"), 4),
            _significant(_ratio(metrics.get("perplexity"), teacher.get("perplexity")), 4),
            _decimals(metrics.get("kl"), 4),
            _decimals(metrics.get("top1"), 4),
            _seconds(metrics.get("seconds")),
        ]
        for name, metrics in measured.items()
        if metrics
    ]
    return _Table(title, header, rows)


def _phases_table(results: dict[str, Any]) -> _Table:
    """The end of each phase, for stages with several phases or with one that was cut short."""
    stages = {name: stage.get("phases") or [] for name, stage in (results.get("stages") or {}).items()}
    rows: list[list[str | None]] = [
        [f"{name}, {phase['data']} text", _count(phase["steps"]), _count(phase["tokens"]), phase["ended_by"]]
        for name, phases in stages.items()
        for phase in phases
        if len(phases) > 1 or phase["ended_by"] != "budget"
    ]
    return _Table("Phases", ["", "steps", "tokens", "ended by"], rows)


def _tasks_table(results: dict[str, Any]) -> _Table:
    outcome = results.get("tasks") or {}
    title = "Tasks"
    if outcome.get("limit") is not None:
        title += f" (the first {outcome['limit']:,} questions of each)"
    if outcome.get("truncated_requests"):
        title += f" ({outcome['truncated_requests']:,} contexts cut to the window of {outcome['window']:,} tokens)"
    preset = outcome.get("preset") or {"metrics": {}}
    rows: list[list[str | None]] = []
    for name, task in (outcome.get("tasks") or {}).items():
        for metric, metrics in task["metrics"].items():
            label = f"{metric} (lower is better)" if metrics["higher_is_better"] is False else metric
            label += " *" if preset["metrics"].get(name) == metric else ""
            counts = [_count(task.get("num_fewshot")), _count(task.get("samples"))]
            rows.append([name, label, *counts, *_compared(metrics)])
    if "average" in preset:
        rows.append([f"{preset['name']}: average", "*", None, None, *_compared(preset["average"])])
    return _Table(title, ["task", "metric", "num_fewshot", "questions", "teacher", "student", "retained %"], rows)


def _compared(metrics: dict[str, Any]) -> list[str | None]:
    return [
        _metric(metrics.get("teacher")),
        _metric(metrics.get("student")),
        _decimals(metrics.get("retention"), 1),
    ]


def _speed_table(results: dict[str, Any]) -> _Table:
    speed = results.get("speed") or {}
    teacher, student = speed.get("teacher_tokens_per_second"), speed.get("student_tokens_per_second")
    rows = [
        ["teacher", _significant(teacher, 3), None],
        ["student", _significant(student, 3), _decimals(_ratio(student, teacher), 2)],
    ]
    return _Table("Generation", ["", "tokens/s", "x teacher"], [row for row in rows if row[1] is not None])


def _sizes_table(results: dict[str, Any]) -> _Table:
    sizes = results.get("sizes") or {}
    return _Table("On disk", ["", "size"], [[name, size] for name, size in sizes.items()])


def _cells(table: _Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows without empty columns."""
    kept = [column for column in range(len(table.header)) if any(row[column] is not None for row in table.rows)]
    rows = [[row[column] or _MISSING for column in kept] for row in table.rows]
    return [table.header[column] for column in kept], rows


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _decimals(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _significant(value: float | None, digits: int) -> str | None:
    """A value with so many significant digits, never in powers of ten."""
    if value is None:
        return None
    whole_digits = 1 if abs(value) < 1 else int(math.log10(abs(value))) + 1
    return f"{value:,.{max(0, digits - whole_digits)}f}"


def _metric(value: float | None) -> str | None:
    """A share as 0.1234; a perplexity or another large value with four significant digits."""
    return _decimals(value, 4) if value is None or abs(value) <= 1 else _significant(value, 4)


def _seconds(value: float | None) -> str | None:
    return None if value is None else _decimals(value, 1 if value < 10 else 0)
