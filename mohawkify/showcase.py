"""The tour behind `make demo`: the embedded teacher, the whole way, with everything on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mohawkify import pipeline, storage
from mohawkify.cli_inspect import inspect_source
from mohawkify.cli_show import inspection_text, plan_text, short_bytes, table
from mohawkify.demo import split_stories
from mohawkify.errors import MissingExtraError
from mohawkify.evaluate.run import evaluate_run, load_run_models, teacher_folder
from mohawkify.evaluate.speed import decode_speed
from mohawkify.export.export import export_run
from mohawkify.generate import write_text
from mohawkify.recipe import load_recipe
from mohawkify.run import RunFolder
from mohawkify.teacher.locate import DEMO

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
    report(plan_text(pipeline.plan(DEMO, recipe)))
    report("\n[3/6] convert: orient, align, distill\n")
    run = pipeline.convert(DEMO, recipe, output=output, resume="auto", report=report)
    device = pipeline.choose_device(recipe.compute.device)

    report("\n[4/6] evaluate: the finished student, loaded again\n")
    evaluate_run(run, device=device, report=report)

    report("\n[5/6] export\n")
    teacher = teacher_folder(run)
    sizes = {"teacher": _bytes(teacher), "student": _bytes(run.final)}
    places = {"teacher": teacher, "run": run.path, "student": run.final}
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
        text = write_text(
            model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0, seed=0, on_text=lambda piece: None
        )
        report(f"{name}: {prompt} [...]{text}\n")
        speed = decode_speed(model, prompt_tokens=16, new_tokens=SPEED_TOKENS, device=device)
        speeds[name] = speed["tokens_per_second"]
    return summary(run.results(), speeds, sizes, places, time.monotonic() - begin, device)


def summary(
    results: dict[str, Any],
    speeds: dict[str, float],
    sizes: dict[str, int],
    places: dict[str, Path],
    seconds: float,
    device: torch.device,
) -> str:
    """Write the closing table.

    Args:
        results: the run's `results.json`.
        speeds: tokens per second by model.
        sizes: bytes on disk by what lies there.
        places: folders by what they hold.
        seconds: of the whole tour.
        device: where it ran.
    """
    quality = [("teacher", "", f"{results['teacher']['perplexity']:.3f}", "0", "1", "")]
    quality += [
        (
            "student, start" if name == "init" else f"student, {name}",
            f"{row['tokens']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.4f}",
            f"{row['seconds']:.0f}",
        )
        for name, row in results["stages"].items()
    ]
    use = [
        (
            name,
            f"{speeds[name]:,.0f}" if name in speeds else "",
            short_bytes(sizes[name]) if name in sizes else "",
            str(place),
        )
        for name, place in places.items()
    ]
    return "\n".join(
        [
            "",
            table(("", "tokens seen", "perplexity", "KL nats/token", "top-1", "seconds"), quality),
            "",
            table(("", "tokens/s", "on disk", "lies in"), [(*row[:3], f"  {row[3]}".rstrip()) for row in use]),
            "",
            f"{results['evaluation_tokens']:,} held-out tokens; tokens/s: one sequence, greedy, on {device.type}; "
            f"all of it took {seconds:.0f} s",
        ]
    )


def _export(run: RunFolder, target: str, report: Report) -> Path:
    """Export to the run's own folder; what an earlier tour left there is replaced."""
    directory = run.path / "exports" / target
    if directory.is_dir():
        storage.remove_directory(directory)
    found = export_run(run.path, target, directory, report=report)
    report(f"{target}: {found['kl']:.2g} nats per token from the run, top-1 {found['top1']:.4f}")
    return directory


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
