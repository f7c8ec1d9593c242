"""Measure a finished run again: on its own held-out text, and on the tasks of lm-eval."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.stage_text import TextReader
from mohawkify.data.validation import evaluation_batches
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import TeacherError, UsageError
from mohawkify.evaluation.fidelity import measure_fidelity, measure_perplexity
from mohawkify.evaluation.harness import run_tasks
from mohawkify.evaluation.harness_tasks import TaskSet, load_preset, load_tasks
from mohawkify.evaluation.provenance import provenance, text_sha256
from mohawkify.evaluation.report import markdown_report
from mohawkify.evaluation.response_cache import ResponseCache
from mohawkify.evaluation.speed import decode_speed
from mohawkify.files import atomic
from mohawkify.files.lock import run_lock
from mohawkify.recipe.loading import apply_overrides
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RunFolder, changed_files
from mohawkify.student.save import load_student
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.teacher.tokenizer import load_tokenizer

Report = Callable[[str], None]
_MEASURED = re.compile(r"data\.validation$|evaluation\.\w+$")  # keys that decide what a student is measured on
EVAL_JSON, EVAL_MARKDOWN = "eval.json", "eval.md"
RESPONSES = "responses"  # the folder of a run where responses are kept until its evaluation is done


def run_teacher(run: RunFolder, override: str | None = None) -> ResolvedTeacher:
    """Resolve a run's teacher; its files are those that the run was made from, by their hashes.

    Args:
        run: the run.
        override: where the teacher is now; None for the folder that the run records.

    Raises:
        TeacherError: it is not there, or its files have changed.
    """
    facts = run.teacher()
    recorded = Path(facts["folder"])
    is_there = recorded.is_dir()
    try:
        teacher = resolve_teacher(override or (str(recorded) if is_there else facts["source"]), need="weights")
    except TeacherError as error:
        if override is not None or is_there:
            raise
        raise TeacherError(
            f"the teacher of {run.path} is no longer in {recorded}: {error.message}",
            hint="name the folder where it is now with --teacher",
        ) from error
    changed = changed_files(facts["files"], teacher.file_hashes)
    text_files = run.text_files()
    if text_files is not None:
        changed += changed_files(text_files, teacher.text_hashes)
    if changed:
        raise TeacherError(
            f"{teacher.folder} is not the teacher that {run.path} was made from: {changed[0]} differs",
            hint="name the folder of the original teacher with --teacher",
        )
    return teacher


def load_run_models(
    run: RunFolder, teacher: ResolvedTeacher | None, device: torch.device
) -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    """Load what a run is made of.

    Args:
        run: a finished run.
        teacher: as `run_teacher` returned it; None leaves the teacher out.
        device: where the models go.

    Returns:
        The models by name, ``teacher`` first if it is loaded, then ``student``; and the tokenizer of both.

    Raises:
        TeacherError: the teacher is damaged.
        CheckpointError: the student is damaged.
    """
    models: dict[str, PreTrainedModel] = {}
    if teacher is not None:
        is_bf16 = run.recipe().compute.precision == "bf16"  # then it taught in bf16, and is measured as it taught
        models["teacher"] = load_teacher(teacher, dtype=torch.bfloat16 if is_bf16 else torch.float32, device=device)
    student: Any = load_student(run.checked_final())
    models["student"] = student.to(device)
    return models, load_tokenizer(run.final, student.config.vocab_size, student.config.to_dict())


@dataclass(frozen=True)
class EvaluateOptions:
    """The settings of a measurement.

    Args:
        against: ``teacher`` measures both and compares them; ``none`` the student alone.
        teacher_source: where the teacher is now; None for the folder that the run records.
        tasks: names of lm-eval tasks, with commas between.
        preset: the name of a set of such tasks.
        limit: only the first questions of each task.
        num_fewshot: examples in front of each question; None leaves it to the task.
        include_path: a folder with more tasks.
        batch_size: questions per forward pass.
        speed: whether to time generation too.
        overrides: other held-out text: values of ``data.validation`` and ``evaluation`` instead of the run's.
    """

    against: str = "teacher"
    teacher_source: str | None = None
    tasks: str | None = None
    preset: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    batch_size: int = 8
    speed: bool = False
    overrides: tuple[str, ...] = ()


def evaluate_run(run: RunFolder, options: EvaluateOptions, *, device: torch.device, report: Report) -> dict[str, Any]:
    """Measure the finished student of a run, and write eval.json and eval.md into the run.

    Args:
        run: a finished run.
        options: what is measured.
        device: where to compute.
        report: receives a line for every step of the way.

    Returns:
        What `mohawkify.evaluation.report` reads: ``name`` and the metrics of the ``student``; with a teacher its own,
        and ``evaluation_tokens``, how many predictions were compared; ``tasks`` and ``speed`` on request, and
        ``provenance`` (`mohawkify.evaluation.provenance`).

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call takes the responses that are stored already.
        MohawkifyError: anything foreseeable, such as a teacher that is gone, or another process at work in the run.
    """
    # First of all, because a mistyped task should not cost the loading of two models.
    tasks = _task_set(options)
    with run_lock(run.path), Shutdown() as stop:
        try:
            results = _measure(run, tasks, options, device, report)
            atomic.write_text(run.path / EVAL_MARKDOWN, markdown_report(results))
            atomic.write_json(run.path / EVAL_JSON, results)
            if (run.path / RESPONSES).is_dir():
                atomic.remove_directory(run.path / RESPONSES)
        except KeyboardInterrupt:
            stop.check("before all was measured" + ("; the responses so far are kept" if tasks else ""))
            raise
    return results


def _measure(
    run: RunFolder, tasks: TaskSet | None, options: EvaluateOptions, device: torch.device, report: Report
) -> dict[str, Any]:
    recipe = _with_own_text(run.recipe(), options.overrides)
    resolved = run_teacher(run, options.teacher_source) if options.against == "teacher" else None
    report(f"loading the student from {run.final}" + (f" and the teacher from {resolved.folder}" if resolved else ""))
    models, tokenizer = load_run_models(run, resolved, device)
    student, teacher = models["student"], models.get("teacher")
    results: dict[str, Any] = {"name": run.results().get("name"), "provenance": provenance(run, models, device)}
    # Before the tasks, which may take hours. Text beside the teacher is found without it being compared, or even whole.
    text_base = resolved.require_folder() if resolved else Path(run.teacher()["folder"])
    recorded = run.text()
    if options.overrides:
        recorded, results["overrides"] = {}, list(options.overrides)
    elif not recorded:
        report(
            "warning: the run does not say which text it was measured on; if that has changed, metrics do not compare"
        )
    text = TextReader(
        recipe, tokenizer, run.corpora, text_base, student.config.vocab_size, report=report, recorded=recorded
    )
    rows = text.held_out()
    results["provenance"]["text"] = text_sha256(rows)
    report(f"read {sum(len(row) for row in rows):,} tokens of held-out text")
    if tasks is not None:
        report(f"running the tasks {tasks.preset or ', '.join(tasks.names)}")
        responses = _responses(run, results["provenance"], models, options.batch_size, report)
        results["tasks"] = run_tasks(
            models, tokenizer, tasks, batch_size=options.batch_size, limit=options.limit, responses=responses
        )
    batches = evaluation_batches(rows, recipe.evaluation.batch_sequences)
    if teacher is None:
        results["student"] = {"perplexity": measure_perplexity(student, batches)}
    else:
        fidelity = measure_fidelity(student, teacher, batches, device=device)
        results["teacher"] = {"perplexity": fidelity.teacher_perplexity}
        results["student"] = {"perplexity": fidelity.perplexity, "kl": fidelity.kl, "top1": fidelity.top1}
        results["evaluation_tokens"] = fidelity.tokens
    if options.speed:
        results["speed"] = {f"{name}_tokens_per_second": decode_speed(model, device) for name, model in models.items()}
    return results


def _with_own_text(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with other held-out text.

    Raises:
        UsageError: an override is of something else, or training text would count as held out.
    """
    foreign = [key for key in (override.partition("=")[0] for override in overrides) if not _MEASURED.match(key)]
    if foreign:
        raise UsageError(f"--set: found {foreign[0]}, expected data.validation or a key of evaluation")
    changed = apply_overrides(recipe, overrides)
    if overrides and not changed.data.validation:
        raise UsageError(
            "--set: found a change of what the run held out of its own text, expected other text beside it",
            hint="name text of your own with --validation",
        )
    return changed


def _responses(
    run: RunFolder, facts: dict[str, Any], models: dict[str, PreTrainedModel], batch_size: int, report: Report
) -> dict[str, ResponseCache]:
    """Each model's stored responses, in a file named by a hash of all that they depend on but the requests."""
    folder = run.path / RESPONSES
    atomic.ensure_writable(folder)
    caches = {}
    for name in models:
        depends_on = [facts["versions"], facts["device"], facts[name], facts["student"]["files"], batch_size]
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        caches[name] = ResponseCache(folder / f"{name}-{key[:16]}.jsonl")
        if len(caches[name]):
            report(
                f"{len(caches[name]):,} responses of the {name} are there already, from an evaluation that was stopped"
            )
    return caches


def _task_set(options: EvaluateOptions) -> TaskSet | None:
    """The tasks of the options, None if they name none; refuses settings that would be ignored."""
    names = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    if options.tasks is not None and not names:
        raise UsageError("--tasks names no task, expected names with commas between")
    of_tasks = {
        "--tasks": options.tasks,
        "--num-fewshot": options.num_fewshot,
        "--include-path": options.include_path,
    }
    clashing = [flag for flag, value in of_tasks.items() if value is not None]
    if options.preset is not None and clashing:
        raise UsageError(f"found --preset and {clashing[0]}, expected one of them: a preset sets its own")
    ignored = [flag for flag, value in {"--limit": options.limit, **of_tasks}.items() if value is not None]
    if options.preset is None and not names and ignored:
        raise UsageError(f"found {ignored[0]} without --tasks or --preset, expected both or neither")
    if options.preset is not None:
        return load_preset(options.preset)
    return load_tasks(names, options.num_fewshot, options.include_path) if names else None
