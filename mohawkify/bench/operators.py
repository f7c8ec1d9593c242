"""Benchmarks of operators: every form is checked against the definition in float64, and timed if all of ours pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mohawkify.bench.cases import (
    ALLOWED_ERROR,
    FOREIGN,
    Case,
    Sizes,
    cast_inputs,
    find_cases,
    make_inputs,
    run_form,
    task_of,
)
from mohawkify.bench.markdown import Bound, Measure, Report
from mohawkify.bench.measure import can_measure_memory, peak_in_child, peak_over, side_by_side
from mohawkify.errors import NumericsError

CPU = torch.device("cpu")  # has float64, which not every device has
ROUNDS = 5
SHARE_OF_MEMORY = 0.125
LONG = 8192


def bench_operators(device: torch.device, *, quick: bool, report: Report) -> dict[str, Any]:
    """Check and time every operator.

    Args:
        quick: tiny sizes and no memory; the measures then mean little.

    Returns:
        A JSON object: ``rows`` (a form each) and ``measures``.

    Raises:
        NumericsError: a form of ours is off; nothing is timed then.
    """
    cases = find_cases(device)
    errors = {}
    for name, case in cases.items():
        report(f"{name}: errors against float64")
        errors[name] = check_errors(case, case.quick if quick else case.checked_at, torch.float32, device)
    require_small(errors, torch.float32)
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        report(f"{name}: time and memory")
        rows += time_case(case, case.quick if quick else case.sizes, errors[name], device, memory=not quick)
    measures = _scan_measures(rows) + _loss_measures(rows, "orient", "bands", 1.0)
    measures += _loss_measures(rows, "distill", "chunks", 1.15)
    if not quick:
        report(f"orient: memory at a length of {LONG}")
        measures += _growth(cases["orient"], rows, device)
    return {"rows": rows, "measures": [measure.to_json() for measure in measures]}


def check_errors(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far each form is from the definition in float64: |difference| / |exact| of its worst tensor."""
    inputs, learned = make_inputs(case, sizes, dtype, device)
    exact = run_form(case.plain, cast_inputs(inputs, torch.float64, CPU), learned)
    errors = {}
    for name, form in case.forms.items():
        found = run_form(form, cast_inputs(inputs, dtype, device), learned)
        errors[name] = max(_error(tensor, exact[which]) for which, tensor in found.items())
    return errors


def _error(found: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.to(CPU, torch.float64) - exact) / torch.linalg.vector_norm(
        exact
    ).clamp_min(1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def require_small(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> None:
    """Refuse to go on if a form of ours is off.

    Raises:
        NumericsError: it names the form, what was found and what is allowed.
    """
    allowed = ALLOWED_ERROR[dtype]
    for case, forms in errors.items():
        for form, error in forms.items():
            if not form.startswith(FOREIGN) and not error <= allowed:
                raise NumericsError(
                    f"{case}, {form}: found an error of {error:.2g} against float64, allowed {allowed:.2g}",
                    hint="no speed is reported for wrong results; this is a bug of the form or of the device",
                )


def time_case(
    case: Case, sizes: Sizes, errors: dict[str, float], device: torch.device, *, memory: bool
) -> list[dict[str, Any]]:
    """Time the forms of a case in turn; a peer that is off gets no time, ours were refused before."""
    allowed = ALLOWED_ERROR[torch.float32]
    timed = {name: form for name, form in case.forms.items() if errors[name] <= allowed}
    inputs, learned = make_inputs(case, sizes, torch.float32, device)
    calls: dict[str, Callable[[], object]] = {
        name: partial(run_form, form, inputs, learned) for name, form in timed.items()
    }
    timings = side_by_side(calls, ROUNDS, device)
    base = timings.get(case.base)
    rows = []
    for name, error in errors.items():
        row: dict[str, Any] = {"case": case.name, "form": name, "sizes": sizes, "error": error}
        if name in timings:
            row |= timings[name].to_json()
            row["share_of_base"] = timings[name].over(base) if base is not None else None
            row["base"] = case.base
            row["peak_bytes"] = peak_of(case, name, sizes, device) if memory and learned else None
        rows.append(row)
    return rows


def peak_of(case: Case, form: str, sizes: Sizes, device: torch.device) -> int | None:
    """The memory of a form beside its inputs; None if the system does not report it."""
    if device.type == "cuda":
        inputs, learned = make_inputs(case, sizes, torch.float32, device)
        return peak_over(lambda: run_form(case.forms[form], inputs, learned), device)
    return peak_in_child(task_of(case, form, sizes)) if can_measure_memory() else None


def _row(rows: list[dict[str, Any]], case: str, form: str) -> dict[str, Any]:
    return next(row for row in rows if (row["case"], row["form"]) == (case, form))


def _scan_measures(rows: list[dict[str, Any]]) -> list[Measure]:
    ours, theirs = _row(rows, "scan", "chunked"), _row(rows, "scan", FOREIGN + "ssd_minimal")
    return [
        Measure("scan: speed over ssd_minimal", 1 / ours["share_of_base"], Bound.AT_LEAST, 1.5),
        Measure("scan: error over ssd_minimal's", ours["error"] / theirs["error"], Bound.AT_MOST, 1.0),
    ]


def _loss_measures(rows: list[dict[str, Any]], case: str, form: str, time_bound: float) -> list[Measure]:
    """Time and memory of a loss over those of the direct form."""
    ours, direct = _row(rows, case, form), _row(rows, case, "direct")
    measures = [Measure(f"{case}: time over the direct form's", ours["share_of_base"], Bound.AT_MOST, time_bound)]
    if ours["peak_bytes"] is not None:
        share = ours["peak_bytes"] / max(direct["peak_bytes"], 1)
        measures.append(Measure(f"{case}: memory over the direct form's", share, Bound.AT_MOST, SHARE_OF_MEMORY))
    return measures


def _growth(case: Case, rows: list[dict[str, Any]], device: torch.device) -> list[Measure]:
    """How much more memory the bands of stage 1 take on a longer sequence."""
    row = _row(rows, case.name, "bands")
    peak = peak_of(case, "bands", {**row["sizes"], "length": LONG}, device)
    if peak is None:
        return []
    title = f"{case.name}: growth of memory from {row['sizes']['length']} to {LONG}"
    return [Measure(title, peak / max(row["peak_bytes"], 1), Bound.AT_MOST, 4.5)]
