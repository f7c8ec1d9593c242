"""The memory of one thing in a process of its own: `python -m mohawkify.bench.child TASK`, TASK being JSON.

The process loads what it needs with a small run, makes the inputs, and measures one run over them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from mohawkify.bench.measure import peak_over

CPU = torch.device("cpu")


def main() -> None:
    """Print ``{"peak_bytes": ...}``."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    measure = {"op": _measure_operator, "train": _measure_step}[task["kind"]]
    print(json.dumps({"peak_bytes": measure(task)}))


def _measure_operator(task: dict[str, Any]) -> int:
    from mohawkify.bench.cases import find_cases, make_inputs, run_form

    case = find_cases(CPU)[task["case"]]
    form = case.forms[task["form"]]
    inputs, learned = make_inputs(case, case.small or case.quick, torch.float32, CPU)
    run_form(form, inputs, learned)
    inputs, learned = make_inputs(case, task["sizes"], torch.float32, CPU)
    return peak_over(lambda: run_form(form, inputs, learned), CPU)


def _measure_step(task: dict[str, Any]) -> int:
    from mohawkify.bench.training import Workload

    workload = Workload.make(task["teacher"], task["batch"], task["length"], CPU)
    return peak_over(workload.step(task["stage"], task["form"]), CPU)


if __name__ == "__main__":
    main()
