"""The tour behind `make demo`: the embedded teacher, the whole way, with everything on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mohawkify.cli.inspection import inspect_source
from mohawkify.cli.plan_tables import plan_text
from mohawkify.cli.tables import inspection_text, short_time
from mohawkify.demo import split_stories
from mohawkify.distributed.device import choose_device
from mohawkify.errors import MissingExtraError
from mohawkify.evaluate.evaluation import evaluate_run, load_run_models, run_teacher
from mohawkify.evaluate.generation import generate_text
from mohawkify.evaluate.report import console_table
from mohawkify.evaluate.speed import decode_speed
from mohawkify.export.export import export_run
from mohawkify.files import atomic
from mohawkify.plan.planning import plan
from mohawkify.recipe.loading import load_recipe
from mohawkify.run.folder import RunFolder
from mohawkify.teacher.locate import DEMO
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert

Report = Callable[[str], None]
TARGETS = ("hf", "mlx-q4")
PROMPT_WORDS = 24
SAMPLE_TOKENS = 80
SPEED_TOKENS = 64


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
    recipe = load_recipe(DEMO)
    report("\n[1/6] inspect: what the teacher is, and what becomes of it\n")
    report(inspection_text(inspect_source(DEMO)))
    report("\n[2/6] plan: what the conversion will take\n")
    report(plan_text(plan(DEMO, recipe)))
    report("\n[3/6] convert: orient, align, distill\n")
    run = convert(DEMO, recipe, ConvertOptions(output=output, report=report))
    device = choose_device(recipe.compute.device)

    report("\n[4/6] evaluate: the finished student, loaded again\n")
    report(console_table(evaluate_run(run, device=device, report=report)))

    report("\n[5/6] export\n")
    teacher = run_teacher(run)
    teacher_folder = teacher.require_folder()
    sizes = {"teacher": _bytes(teacher_folder), "student": _bytes(run.final)}
    places = {"teacher": teacher_folder, "run": run.path, "student": run.final}
    for target in TARGETS:
        try:
            places[target] = _export(run, target, report)
        except MissingExtraError as missing:
            report(f"{target} is left out: {missing.message}; {missing.hint}")
        else:
            sizes[target] = _bytes(places[target])

    report("\n[6/6] a story begun, continued by teacher and student\n")
    models, tokenizer = load_run_models(run, teacher, device)
    prompt = " ".join(split_stories("validation")[0].split()[:PROMPT_WORDS])
    speeds = {}
    for name, model in models.items():
        text = generate_text(
            model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0, seed=0, on_text=lambda piece: None
        )
        report(f"{name}: {prompt} [...]{text}\n")
        speed = decode_speed(model, prompt_tokens=16, new_tokens=SPEED_TOKENS, device=device)
        speeds[name] = speed["tokens_per_second"]
    results = {
        **run.results(),
        "speed": {f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
        "sizes": sizes,
    }
    lines = [
        "",
        console_table(results),
        "",
        "Where everything lies",
        *(f"  {name:<8} {place}" for name, place in places.items()),
        "",
        f"Generation: one sequence, greedy, on {device.type}. All of it took {short_time(time.monotonic() - begin)}.",
    ]
    return "\n".join(lines)


def _export(run: RunFolder, target: str, report: Report) -> Path:
    """Export to the run's own folder; what an earlier tour left there is replaced."""
    directory = run.path / "exports" / target
    if directory.is_dir():
        atomic.remove_directory(directory)
    found = export_run(run.path, target, directory, report=report)
    report(f"{target}: {found['kl']:.2g} nats per token from the run, top-1 {found['top1']:.4f}")
    return directory


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
