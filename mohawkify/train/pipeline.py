"""The whole method on one page: a teacher and a recipe in, a measured student out; stopped anywhere, it continues."""

from __future__ import annotations

import platform
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.prepare import UNFINISHED
from mohawkify.data.stage_text import TextReader, epochs_needed, stage_ranges
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.distributed.device import choose_device
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import MohawkifyError, TeacherError, UsageError
from mohawkify.evaluate.report import markdown_report
from mohawkify.files import atomic, disk
from mohawkify.files.lock import run_lock
from mohawkify.objectives.objective import Pair
from mohawkify.ops import dispatch
from mohawkify.plan.planning import plan_run, student_of
from mohawkify.recipe.loading import comparable_text, dump_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RUNS, RunFolder, changed_files, run_identity
from mohawkify.student.build import build_student, checkpoint_activations, use_kernels
from mohawkify.student.save import save_student, weight_bytes
from mohawkify.student.student_spec import StudentSpec
from mohawkify.student.verify import prove_family
from mohawkify.teacher.inspect import Inspection, inspect_teacher
from mohawkify.teacher.lm_head import prove_head
from mohawkify.teacher.load import load_teacher, teacher_hashes
from mohawkify.teacher.locate import find_folder, teacher_name
from mohawkify.teacher.second import (
    FinalTeacher,
    SecondTeacher,
    final_teacher_hashes,
    find_final_teacher,
    require_fitting_text,
    require_fitting_tokens,
)
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.tokenizer_files import text_hashes
from mohawkify.train.conversion import ConvertOptions, ignore
from mohawkify.train.engines.choice import (
    choose_engine,
    ignored_settings,
    require_agreeing_settings,
    require_even_shares,
)
from mohawkify.train.tracking import Tracking, require_trackers, tracking_id
from mohawkify.train.trainer import Conversion, Report


def convert(teacher_source: str, recipe: Recipe, options: ConvertOptions, world: World | None = None) -> RunFolder:
    """Convert a teacher; where several processes work on it, each makes the same call.

    Args:
        teacher_source: the teacher: a Hub id or a folder.
        recipe: the resolved recipe.
        options: how the conversion runs.
        world: the processes, which share a file system; None for this one alone.

    Returns:
        The finished run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        MohawkifyError: anything foreseeable; nothing is left half-written.
    """
    require_trackers(options.track)
    world = world or World()
    with Shutdown() as stop:
        try:
            return _convert(teacher_source, recipe, options, stop, world)
        except KeyboardInterrupt:
            stop.check("outside of training; nothing is half-written")
            raise


def _convert(source: str, recipe: Recipe, options: ConvertOptions, stop: Shutdown, world: World) -> RunFolder:
    output, resume, prepared = options.output, options.resume, options.prepared
    hang_timeout, disk_wait, track_project = options.hang_timeout, options.disk_wait, options.track_project
    track = options.track if world.is_rank0 else ()
    report = options.report if world.is_rank0 else ignore
    require_even_shares(recipe, world)
    engine = choose_engine(recipe.compute, world)
    require_agreeing_settings(recipe, world)
    inspection = world.rank0_first(lambda: inspect_teacher(source))
    student = student_of(source, inspection, recipe)
    device = choose_device(recipe.compute.device)
    dispatch.require(recipe.compute.kernels, device)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    run = RunFolder(output or RUNS / student.name)
    is_new = world.is_rank0 and not run.path.exists()
    # The lock comes before what takes minutes, such as hashing the teacher: a second process is refused at once.
    with run_lock(run.path) if world.is_rank0 else nullcontext():
        try:
            folder = world.rank0_first(lambda: find_folder(source))
            own = teacher_hashes(folder) if world.local_rank == 0 else None
            hashes = _agreed(own, f"the teacher in {folder}", world)
            own = text_hashes(folder) if world.local_rank == 0 else None
            text_files = _agreed(own, f"the tokenizer in {folder}", world)
            final_teacher = world.rank0_first(lambda: find_final_teacher(recipe))
            own = final_teacher_hashes(final_teacher) if world.local_rank == 0 else None
            final_hashes = _agreed(own, "what finishes the run", world)
            facts = {**inspection.spec.to_json(), "folder": str(folder.resolve()), "files": hashes}
            facts |= {"text_files": text_files}
            facts |= {"final_teacher_files": final_hashes} if final_hashes else {}
            identity = world.on_rank0(lambda: _open(run, recipe, inspection, student, facts, resume, device, world))
            if identity is None:
                report(f"{run.path} is already finished")
                return run
            conversion, tokenizer = _prepare(
                run, recipe, identity, folder, inspection, student, final_teacher, device, world, prepared, report
            )
        except MohawkifyError:
            # Nothing was trained: a folder made for this run would only stand in the way of the corrected command. But
            # text that is half tokenised is worth keeping: the same command goes on with it.
            if is_new and not any(run.corpora.glob(f"{UNFINISHED}*/*")):
                atomic.remove_directory(run.path)
            raise
        if world.size > 1:
            report(f"training in {world.size} processes, engine {engine}")
        for key, value in ignored_settings(recipe.compute, engine).items():
            report(f"compute.{key} {value} has no effect on the engine {engine}, which --engine auto chose here")
        conversion.hang_timeout, conversion.disk_wait = hang_timeout, disk_wait
        if track:
            conversion.start_tracking = partial(
                Tracking,
                track,
                project=track_project,
                run_id=tracking_id(run.tracking_file),
                run_name=student.name,
                folder=run.tracking,
                config=recipe.model_dump(mode="json"),
                report=report,
            )
        stop.check("before training")
        conversion.train(stop)
        stop.check("before the student was written")
        world.on_rank0(lambda: _finish(conversion, tokenizer))
        stop.check("after the student was written: the run is finished")
    return run


def _agreed(own: dict[str, str] | None, what: str, world: World) -> dict[str, str]:
    """Hashes of what every machine has to itself, and must be the same on all; None where another process looks."""
    agreed = world.on_rank0(lambda: own)
    assert agreed is not None
    if own is not None and own != agreed:
        raise TeacherError(f"{what} is on {platform.node()} not what the main process has")
    return agreed


def _open(
    run: RunFolder,
    recipe: Recipe,
    inspection: Inspection,
    student: StudentSpec,
    teacher: dict[str, Any],
    resume: str,
    device: torch.device,
    world: World,
) -> str | None:
    """Make the run's folder ready.

    Returns:
        The identity of the run, or None where it is finished.
    """
    atomic.ensure_writable(run.path)
    hashes = teacher["files"] | teacher.get("final_teacher_files", {})
    identity = _claim(run, recipe, hashes, teacher["text_files"], resume)
    if run.is_finished:
        run.checked_final()
        return None
    atomic.sweep_leftovers(run.path)  # of one that was refused, and killed while it was removed
    for folder in (run.path, run.checkpoints, run.corpora):
        atomic.sweep_temporaries(folder, alone=True)
    checkpoint.rotate(run.checkpoints, recipe.checkpoint.keep)  # a kill may have come before the last rotation
    planned = plan_run(inspection, student, recipe, device.type, world.size)
    atomic.write_json(run.plan_file, planned)
    atomic.write_json(run.teacher_file, teacher)
    atomic.write_json(run.student_file, student.to_json())
    return identity


def _claim(run: RunFolder, recipe: Recipe, hashes: dict[str, str], text_files: dict[str, str], resume: str) -> str:
    """Take a fresh folder, or continue a run of the same recipe and teacher; the identity is a hash of both.

    What changes a result by rounding only may be another: the file then says how the run goes on.
    """
    text = dump_recipe(recipe)
    if run.recipe_file.is_file():
        if resume == "never":
            raise UsageError(f"{run.path} already holds a run", hint="choose another --output, or --resume auto")
        recorded = run.teacher_files() if run.teacher_file.is_file() else hashes
        recorded_text = run.text_files() if run.teacher_file.is_file() else None
        changed_text = [] if recorded_text is None else changed_files(recorded_text, text_files)
        is_same_recipe = comparable_text(run.recipe()) == comparable_text(recipe)
        for same, what in (
            (is_same_recipe, "recipe"),
            (recorded == hashes, "teacher"),
            (not changed_text, f"{', '.join(changed_text)} of its teacher"),
        ):
            if not same:
                raise UsageError(
                    f"{run.path} holds a run with another {what}", hint="choose another --output, or remove that folder"
                )
        if run.recipe_file.read_text(encoding="utf-8") != text and not run.is_finished:
            atomic.write_text(run.recipe_file, text)
    else:
        foreign = [entry.name for entry in run.path.iterdir() if not entry.name.startswith(".")]
        if foreign:
            raise UsageError(f"{run.path} is not empty (it holds {foreign[0]})", hint="choose another --output")
        atomic.write_text(run.recipe_file, text)
    return run_identity(recipe, hashes)


def _prepare(
    run: RunFolder,
    recipe: Recipe,
    identity: str,
    folder: Path,
    inspection: Inspection,
    spec: StudentSpec,
    final_teacher: FinalTeacher | None,
    device: torch.device,
    world: World,
    prepared: Path | None,
    report: Report,
) -> tuple[Conversion, PreTrainedTokenizerBase]:
    """Load the teacher, build the student, read the text."""
    vocab_size = inspection.spec.vocab_size
    tokenizer = load_tokenizer(folder, vocab_size)
    text = TextReader(recipe, tokenizer, run.corpora, folder, vocab_size, prepared, report=report)
    text.require_files()
    world.on_rank0(lambda: _require_room(run, text))
    note = final_teacher and require_fitting_tokens(final_teacher, teacher_name(str(folder)), tokenizer)
    if note:
        report(note)
    report(f"loading the teacher from {folder}")
    dtype = torch.bfloat16 if recipe.compute.precision == "bf16" else torch.float32
    is_sharded = recipe.compute.shard_teacher and world.size > 1
    place = torch.device("cpu") if is_sharded else device
    teacher = load_teacher(folder, dtype=dtype, device=place)
    student = build_student(teacher, inspection.adapter, spec, recipe.student.init, recipe.seed)
    prove_head(teacher, inspection.adapter, vocab_size)
    if inspection.adapter.recognised:
        report(f"no file in adapters/ for {spec.teacher_type}: proving what its modules say on the weights")
        prove_family(teacher, student, inspection.adapter, vocab_size)
    if is_sharded:
        student.to(device)  # type: ignore[arg-type]
        _spread(teacher, spec.layers, recipe, device, world)
    if recipe.compute.activation_checkpointing:
        checkpoint_activations(student, spec.layers)
    report("reading the text")
    corpora, held_out = world.rank0_first(lambda: (text.training(), text.held_out()))
    _agreed({name: corpus.fingerprint for name, corpus in corpora.items()}, "the text", world)
    for name, corpus in corpora.items():
        epochs = epochs_needed(recipe, name, corpus.num_tokens)
        report(f"{name}: {corpus.num_tokens:,} tokens" + (f" in {epochs} epochs" if epochs > 1 else ""))
    if isinstance(final_teacher, TeacherLogits):
        last = stage_ranges(recipe, corpora)["distill"][-1]  # the final phase, which has tokens
        require_fitting_text(final_teacher, last, recipe.stages.distill.batch_sequences, recipe.seed)
    use_kernels(student, recipe.compute.kernels)
    pair = Pair(teacher, student, spec, inspection.adapter, recipe.compute.kernels)
    conversion = Conversion(run, recipe, identity, pair, corpora, held_out, device, world, report)
    conversion.final_teacher = final_teacher

    def load_first() -> PreTrainedModel:
        first = load_teacher(folder, dtype=dtype, device=place)
        if is_sharded:
            _spread(first, spec.layers, recipe, device, world)
        return first

    def load_other(other: SecondTeacher) -> PreTrainedModel:
        model = other.load(dtype, place)
        if is_sharded:
            _spread(model, other.adapter.layers, recipe, device, world)
        return model

    conversion.load_first, conversion.load_other = load_first, load_other
    return conversion, tokenizer


def _require_room(run: RunFolder, text: TextReader) -> None:
    """Refuse a run that the disk cannot hold; one that has been saved looks before every checkpoint."""
    if not run.checkpoints.is_dir():
        planned = atomic.read_json(run.plan_file)["disk_bytes"]
        disk.require_space(run.path, planned["checkpoints"] + planned["final"] + text.bytes_to_write())


def _spread(teacher: PreTrainedModel, layers: str, recipe: Recipe, device: torch.device, world: World) -> None:
    """Spread a teacher over the processes, by the library that trains the student."""
    from mohawkify.train.engines.sharded_teacher import shard_teacher

    shard_teacher(
        teacher, layers, "fsdp" if choose_engine(recipe.compute, world) == "fsdp" else "deepspeed", device, world
    )


def _finish(conversion: Conversion, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the report and the student; only then is the run finished."""
    run = conversion.run
    results = run.results()
    last = list(results["stages"].values())[-1]
    results["student"] = {key: last[key] for key in ("perplexity", "kl", "top1")}
    results["name"] = conversion.pair.spec.name
    results["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run.write_results(results)
    atomic.write_text(run.path / "report.md", markdown_report(results))
    student = conversion.pair.student
    with atomic.atomic_directory(run.final, needed=weight_bytes(student)) as folder:
        save_student(student, tokenizer, folder)
    conversion.report(f"the student is in {run.final}")
