"""The whole method on one page: a teacher and a recipe in, a measured student out; stopped anywhere, it continues."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify import checkpoint, storage
from mohawkify.data.corpus import Corpus, build_corpus, hold_out
from mohawkify.data.evaluation import evaluation_batches, evaluation_rows
from mohawkify.errors import CheckpointError, MohawkifyError, UsageError
from mohawkify.evaluate.agreement import measure_agreement
from mohawkify.evaluate.report import markdown_report
from mohawkify.plan import STAGES, make_plan
from mohawkify.recipe import Recipe, dump_recipe
from mohawkify.run import RUNS, RunFolder
from mohawkify.spec import StudentSpec
from mohawkify.stages.align import Align
from mohawkify.stages.base import Pair, Stage
from mohawkify.stages.distill import Distill
from mohawkify.stages.orient import Orient
from mohawkify.student.build import build_student, design_student
from mohawkify.student.save import save_student
from mohawkify.teacher.inspect import Inspection, inspect_teacher
from mohawkify.teacher.load import load_teacher, load_tokenizer, teacher_hashes
from mohawkify.teacher.locate import find_folder, teacher_name
from mohawkify.train.engine import LocalEngine
from mohawkify.train.loop import StepReport, Stretch, run_stage
from mohawkify.train.progress import StageProgress
from mohawkify.train.stop import Interrupted, StopRequest

Report = Callable[[str], None]


@dataclass
class Position:
    """How far a run is: what a checkpoint's state holds."""

    stage: str
    stage_step: int = 0
    global_step: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """Everything a conversion in progress holds."""

    run: RunFolder
    recipe: Recipe
    identity: str
    pair: Pair
    tokenizer: PreTrainedTokenizerBase
    corpora: dict[str, Corpus]
    validation: list[Any]
    device: torch.device
    report: Report


def student_name(source: str, recipe: Recipe) -> str:
    """The student's name: the recipe's, or the teacher's with ``-mohawk``."""
    return recipe.student.name or f"{teacher_name(source)}-mohawk"


def choose_device(wanted: str) -> torch.device:
    """The device of a recipe's ``compute.device``; raises UsageError when it is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[wanted]:
        raise UsageError(f"compute.device is {wanted}, which this machine does not have", hint="use auto or cpu")
    return torch.device(wanted)


def plan(source: str, recipe: Recipe, *, flops_per_second: float | None = None) -> dict[str, Any]:
    """Plan a conversion from the teacher's config.json alone; no weights are read."""
    inspection = inspect_teacher(source)
    student = _design(source, inspection, recipe)
    wanted = recipe.compute.device
    device = choose_device("auto").type if wanted == "auto" else wanted
    return make_plan(inspection.spec, student, recipe, flops_per_second=flops_per_second, device=device)


def convert(source: str, recipe: Recipe, *, output: Path | None, resume: str, report: Report) -> RunFolder:
    """Convert a teacher.

    Args:
        source: the teacher: a Hub id or a folder.
        recipe: the resolved recipe.
        output: the run's folder; None for ``runs/<student name>``.
        resume: ``auto`` continues a run of the same teacher and recipe; ``never`` wants a fresh folder.
        report: receives a line for every step of the way.

    Returns:
        The finished run.

    Raises:
        MohawkifyError: anything foreseeable; nothing is left half-written.
    """
    inspection = inspect_teacher(source)
    student = _design(source, inspection, recipe)
    device = choose_device(recipe.compute.device)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    planned = make_plan(inspection.spec, student, recipe, flops_per_second=None, device=device.type)
    folder = find_folder(source)
    hashes = teacher_hashes(folder)
    run = RunFolder(output or RUNS / student.name)
    is_new = not run.path.exists()
    storage.ensure_writable(run.path)
    with storage.run_lock(run.path):
        try:
            identity = _claim(run, recipe, hashes, resume)
            if run.is_finished:
                report(f"{run.path} is already finished")
                return run
            storage.sweep_temporaries(run.path)
            storage.sweep_temporaries(run.checkpoints)
            if not run.checkpoints.is_dir():
                storage.require_space(run.path, sum(planned["disk_bytes"].values()))
            storage.write_json(run.plan_file, planned)
            facts = {**inspection.spec.to_json(), "folder": str(folder.resolve()), "files": hashes}
            storage.write_json(run.teacher_file, facts)
            storage.write_json(run.student_file, student.to_json())
            conversion = _prepare(run, recipe, identity, folder, inspection, student, device, report)
        except MohawkifyError:
            # Nothing was trained: a folder made for this run would only stand in the way of the corrected command.
            if is_new:
                storage.remove_directory(run.path)
            raise
        with StopRequest() as stop:
            _train(conversion, stop)
        _finish(conversion)
    return run


def _design(source: str, inspection: Inspection, recipe: Recipe) -> StudentSpec:
    name = student_name(source, recipe)
    return design_student(name, inspection.spec, inspection.config, inspection.adapter, recipe.student)


def _claim(run: RunFolder, recipe: Recipe, hashes: dict[str, str], resume: str) -> str:
    """Take a fresh folder, or continue a run of the same recipe and teacher; the identity is a hash of both."""
    text = dump_recipe(recipe)
    identity = hashlib.sha256((text + repr(sorted(hashes.items()))).encode()).hexdigest()
    if run.recipe_file.is_file():
        if resume == "never":
            raise UsageError(f"{run.path} already holds a run", hint="choose another --output, or --resume auto")
        recorded = storage.read_json(run.teacher_file).get("files") if run.teacher_file.is_file() else hashes
        for same, what in ((run.recipe_file.read_text() == text, "recipe"), (recorded == hashes, "teacher")):
            if not same:
                raise UsageError(
                    f"{run.path} holds a run with another {what}", hint="choose another --output, or remove that folder"
                )
    else:
        foreign = [entry.name for entry in run.path.iterdir() if not entry.name.startswith(".")]
        if foreign:
            raise UsageError(f"{run.path} is not empty (it holds {foreign[0]})", hint="choose another --output")
        storage.write_text(run.recipe_file, text)
    return identity


def _prepare(
    run: RunFolder,
    recipe: Recipe,
    identity: str,
    folder: Path,
    inspection: Inspection,
    spec: StudentSpec,
    device: torch.device,
    report: Report,
) -> Conversion:
    report(f"loading the teacher from {folder}")
    tokenizer = load_tokenizer(folder, inspection.spec.vocabulary_size)
    dtype = torch.bfloat16 if recipe.compute.precision == "bf16" else torch.float32
    teacher = load_teacher(folder, dtype=dtype, device=device)
    corpora, validation = _read_data(run, recipe, tokenizer, folder, inspection.spec.vocabulary_size, report)
    student = build_student(teacher, inspection.adapter, spec, recipe.student.init, recipe.seed)
    if recipe.compute.activation_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair = Pair(teacher, student, spec)
    return Conversion(run, recipe, identity, pair, tokenizer, corpora, validation, device, report)


def _read_data(
    run: RunFolder,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    vocabulary_size: int,
    report: Report,
) -> tuple[dict[str, Corpus], list[Any]]:
    """Tokenise what the recipe needs of every corpus, and choose the held-out rows."""

    def corpus(sources: Any, num_tokens: int | None) -> Corpus:
        return build_corpus(
            sources,
            tokenizer,
            directory=run.corpora,
            num_tokens=num_tokens,
            teacher_directory=folder,
            vocab_size=vocabulary_size,
        )

    wanted = {"train": 0, "finish": 0}
    for name in STAGES:
        stage = getattr(recipe.stages, name)
        for segment in stage.segments():
            wanted[segment.data] += segment.num_steps * segment.sequence_length * stage.batch_sequences
    held = recipe.evaluation.tokens
    report("reading the training text")
    if recipe.data.validation:
        corpora = {"train": corpus(recipe.data.train, max(wanted["train"], 1))}
        documents: Any = corpus(recipe.data.validation, held)
    else:
        train, documents = hold_out(corpus(recipe.data.train, wanted["train"] + held), held)
        corpora = {"train": train}
    if wanted["finish"]:
        corpora["finish"] = corpus(recipe.data.finish, wanted["finish"])
    for name, each in corpora.items():
        passes = wanted[name] / each.num_tokens
        report(f"{name}: {each.num_tokens:,} tokens" + (f", read {passes:.1f} times" if passes > 1 else ""))
    rows = evaluation_rows(documents, sequence_length=recipe.evaluation.sequence_length, num_tokens=held)
    return corpora, rows


def _stages(conversion: Conversion) -> dict[str, Stage]:
    stages = conversion.recipe.stages
    return {
        "orient": Orient(conversion.pair),
        "align": Align(conversion.pair, stages.align),
        "distill": Distill(conversion.pair, stages.distill),
    }


def _stretches(conversion: Conversion) -> dict[str, list[Stretch]]:
    """What every stage reads; stages share a corpus's global order, each going on where the one before ended."""
    used = dict.fromkeys(conversion.corpora, 0)
    stretches: dict[str, list[Stretch]] = {}
    for name in STAGES:
        stage = getattr(conversion.recipe.stages, name)
        stretches[name] = []
        for segment in stage.segments():
            first = -(-used[segment.data] // segment.sequence_length)
            corpus = conversion.corpora[segment.data]
            stretches[name].append(Stretch(corpus, segment.num_steps, segment.sequence_length, first))
            used[segment.data] += segment.num_steps * segment.sequence_length * stage.batch_sequences
    return stretches


def _train(conversion: Conversion, stop: StopRequest) -> None:
    run, recipe, report = conversion.run, conversion.recipe, conversion.report
    saved = checkpoint.newest_valid(run.checkpoints, report)
    position = Position(stage=STAGES[0])
    if saved is not None:
        if saved.state["identity"] != conversion.identity:
            raise CheckpointError(f"{saved.path} belongs to another recipe or teacher")
        if saved.state["text"] != _fingerprints(conversion):
            raise CheckpointError(
                f"{saved.path} was trained on other text than is there now", hint="bring back the text, or start anew"
            )
        _load_weights(conversion.pair.student, checkpoint.load_tensors(saved, "model"))
        position = Position(**saved.state["position"])
        report(f"continuing after step {position.stage_step:,} of stage {position.stage}")
    else:
        _measure(conversion, "init", position)

    stretches = _stretches(conversion)
    for name, stage in _stages(conversion).items():
        if STAGES.index(name) < STAGES.index(position.stage):
            continue
        num_steps = sum(stretch.num_steps for stretch in stretches[name])
        if position.stage != name:
            position.stage, position.stage_step = name, 0
        if num_steps == 0:
            continue
        engine = LocalEngine(stage.parameters(), recipe.optimizer, recipe.compute.precision, conversion.device)
        if saved is not None and position.stage_step > 0:
            engine.load_state(checkpoint.load_tensors(saved, "optimizer"))
            checkpoint.restore_rng(checkpoint.load_tensors(saved, "rng"))
        if position.stage_step < num_steps:
            _run_stage(conversion, stage, engine, stretches[name], position, stop)
        if name not in run.results()["stages"]:
            _measure(conversion, name, position)
        saved = None


def _run_stage(
    conversion: Conversion,
    stage: Stage,
    engine: LocalEngine,
    stretches: list[Stretch],
    position: Position,
    stop: StopRequest,
) -> None:
    run, recipe = conversion.run, conversion.recipe
    stage_recipe = getattr(recipe.stages, stage.name)
    tokens_of = [s.num_steps * s.sequence_length * stage_recipe.batch_sequences for s in stretches]
    num_steps = sum(s.num_steps for s in stretches)
    done = _tokens_before(stretches, position.stage_step, stage_recipe.batch_sequences)

    def save() -> None:
        checkpoint.save_checkpoint(
            run.checkpoints,
            global_step=position.global_step,
            model_tensors=dict(conversion.pair.student.named_parameters()),
            optimizer_tensors=engine.state(),
            state={
                "identity": conversion.identity,
                "text": _fingerprints(conversion),
                "position": vars(position),
            },
        )
        checkpoint.rotate(run.checkpoints, recipe.checkpoint.keep)

    with StageProgress(stage.name, sum(tokens_of), done) as progress:

        def on_step(step: StepReport) -> None:
            position.stage_step = step.step
            position.global_step += 1
            position.tokens += step.tokens
            position.seconds[stage.name] = position.seconds.get(stage.name, 0.0) + step.seconds
            record = {
                "stage": stage.name,
                "step": step.step,
                "global_step": position.global_step,
                "tokens": position.tokens,
                **step.figures,
                "learning_rate": step.learning_rate,
                "gradient_norm": step.gradient_norm,
                "seconds": step.seconds,
            }
            storage.append_line(run.metrics_file, record)
            progress.update(step)
            ends = step.step == num_steps
            if ends or stop.number is not None or step.step % recipe.checkpoint.every_steps == 0:
                save()
            if stop.number is not None:
                raise Interrupted(f"stopped after step {step.step:,} of stage {stage.name}, saved", stop.number)

        conversion.pair.student.train()
        run_stage(
            stage,
            engine,
            stretches,
            stage_recipe,
            recipe,
            device=conversion.device,
            first_step=position.stage_step,
            on_step=on_step,
        )


def _tokens_before(stretches: list[Stretch], step: int, batch_sequences: int) -> int:
    tokens = 0
    for stretch in stretches:
        steps = min(step, stretch.num_steps)
        tokens += steps * stretch.sequence_length * batch_sequences
        step -= steps
    return tokens


def _fingerprints(conversion: Conversion) -> dict[str, str]:
    return {name: corpus.fingerprint for name, corpus in conversion.corpora.items()}


def _load_weights(student: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(student.named_parameters())
    if parameters.keys() != tensors.keys():
        raise CheckpointError("the checkpoint's tensors are not those of this student")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _measure(conversion: Conversion, name: str, position: Position) -> None:
    """Compare student and teacher on held-out text and record the figures under a stage's name."""
    batches = list(evaluation_batches(conversion.validation, conversion.recipe.evaluation.batch_sequences))
    found = measure_agreement(conversion.pair.student, conversion.pair.teacher, batches, device=conversion.device)
    results = conversion.run.results()
    results["teacher"]["perplexity"] = found.teacher_perplexity
    results["stages"][name] = {
        "tokens": position.tokens,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "seconds": position.seconds.get(name, 0.0),
    }
    results["evaluation_tokens"] = found.tokens
    conversion.run.write_results(results)
    conversion.report(
        f"after {name}: KL {found.kl:.4f} nats/token, top-1 {found.top1:.4f}, "
        f"perplexity {found.perplexity:.3f} (teacher {found.teacher_perplexity:.3f})"
    )


def _finish(conversion: Conversion) -> None:
    run, student = conversion.run, conversion.pair.student
    results = run.results()
    last = list(results["stages"])[-1]
    results["student"] = {key: results["stages"][last][key] for key in ("perplexity", "kl", "top1")}
    results["name"] = conversion.pair.spec.name
    results["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run.write_results(results)
    storage.write_text(run.path / "report.md", markdown_report(results))
    with storage.atomic_directory(run.final) as folder:
        save_student(student, conversion.tokenizer, folder)
    conversion.report(f"the student is in {run.final}")
