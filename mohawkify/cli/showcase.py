"""The tour behind `make demo`: the embedded teacher, the whole way, with everything on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mohawkify import api
from mohawkify.cli.plan_tables import plan_text
from mohawkify.cli.tables import inspection_text, short_bytes, short_time
from mohawkify.demo import split_stories
from mohawkify.errors import MissingExtraError
from mohawkify.evaluation.report import console_table
from mohawkify.files import atomic
from mohawkify.run.folder import RunFolder

Report = Callable[[str], None]
DEMO = "demo"
TARGETS = ("hf", "mlx-q4")
PROMPT_WORDS = 24
SAMPLE_TOKENS = 80


def run_demo(output: Path, *, report: Report) -> str:
    """Inspect, plan, convert, measure, export, and let both models write.

    Done again, it continues a stopped conversion, or measures and exports a finished one once more.

    Args:
        output: the run's folder.
        report: receives a line for every step of the way.

    Returns:
        The closing table: quality after every stage, speed, sizes, and where everything lies.
    """
    begin = time.monotonic()
    report("\n[1/6] inspect: what the teacher is, and what becomes of it\n")
    report(inspection_text(api.inspect(DEMO)))
    report("\n[2/6] plan: what the conversion will take\n")
    report(plan_text(api.plan(DEMO, DEMO)))
    report("\n[3/6] convert: orient, align, distill\n")
    run = api.convert(DEMO, DEMO, options=api.ConvertOptions(output=output, report=report))

    report("\n[4/6] evaluate: the finished student, loaded again\n")
    measured = api.evaluate(run, api.EvaluateOptions(speed=True), report)
    report(console_table({key: value for key, value in measured.items() if key != "speed"}))

    report("\n[5/6] export\n")
    folders = {"teacher": Path(run.teacher()["folder"]), "run": run.path, "student": run.final}
    for target in TARGETS:
        try:
            folders[target] = _export(run, target, report)
        except MissingExtraError as missing:
            report(f"{target} is left out: {missing.message}; {missing.hint}")

    report("\n[6/6] a story begun, continued by teacher and student\n")
    prompt = " ".join(split_stories("validation")[0].split()[:PROMPT_WORDS])
    texts = api.generate(run, prompt, api.GenerateOptions(max_tokens=SAMPLE_TOKENS), with_teacher=True)
    for name, text in texts.items():
        report(f"{name}: {prompt} [...]{text}\n")
    sizes = {name: short_bytes(_bytes(folder)) for name, folder in folders.items() if name != "run"}
    lines = [
        "",
        console_table({**run.results(), "speed": measured["speed"], "sizes": sizes}),
        "",
        "Where everything lies",
        *(f"  {name:<8} {folder}" for name, folder in folders.items()),
        "",
        f"Generation: one sequence, greedy, on {measured['provenance']['device']}. "
        f"All of it took {short_time(time.monotonic() - begin)}.",
    ]
    return "\n".join(lines)


def _export(run: RunFolder, target: str, report: Report) -> Path:
    """Export to the run's own folder; an earlier export there is replaced."""
    directory = run.path / "exports" / target
    if directory.is_dir():
        atomic.remove_directory(directory)
    done = api.export(run, target, directory, report=report)
    report(f"{target}: {done['kl']:.2g} nats per token from the run, top-1 {done['top1']:.4f}")
    return directory


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
