"""The whole method on one page: a teacher and a recipe in, a measured student out; stopped anywhere, it continues."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.prepare import UNFINISHED
from mohawkify.data.selection import TextReader, epochs_needed, stage_ranges
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import MohawkifyError, RecipeError, TeacherError, UsageError
from mohawkify.evaluate.report import markdown_report
from mohawkify.files import atomic, disk
from mohawkify.files.lock import run_lock
from mohawkify.objectives.objective import Pair
from mohawkify.ops import dispatch
from mohawkify.plan.activations import count_footprint
from mohawkify.plan.gpus import UTILISATION, Gpu, find_gpu, gpu_at_hand
from mohawkify.plan.memory import Footprint
from mohawkify.plan.planner import Machine, layout_of, make_plan
from mohawkify.recipe.schema import Recipe, comparable_text, dump_recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RUNS, RunFolder, changed_files, run_identity
from mohawkify.student.build import build_student, checkpoint_activations, design_student, use_kernels
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
from mohawkify.train.engines.choice import (
    choose_engine,
    require_agreeing_settings,
    require_even_shares,
    unheeded_settings,
)
from mohawkify.train.tracking import PROJECT, Tracking, require_trackers, tracking_id
from mohawkify.train.trainer import Conversion, Report


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


def plan(
    source: str,
    recipe: Recipe,
    *,
    flops_per_second: float | None = None,
    gpu: str | None = None,
    num_gpus: int = 1,
    engine: str = "auto",
    zero: int | None = None,
    utilisation: float = UTILISATION,
    price_per_hour: float | None = None,
    output: Path | None = None,
    count: bool = False,
) -> dict[str, Any]:
    """Plan a conversion from the teacher's config.json alone; no weights are read.

    Args:
        source: the teacher: a Hub id, a folder or a config.json.
        recipe: the resolved recipe.
        flops_per_second: the sustained speed of everything together; None assumes one.
        gpu: the kind of GPU to plan for; None plans for the machine at hand.
        num_gpus: how many share the work.
        engine: ``auto``, ``single``, ``deepspeed`` or ``fsdp``.
        zero: ZeRO's stage, with DeepSpeed; None for the recipe's, or 3.
        utilisation: part of a GPU's peak arithmetic that is sustained.
        price_per_hour: of one GPU; None plans no cost.
        output: where the run will lie, to compare with its free space; None compares nothing.
        count: whether to count activations with the family's own code, which takes seconds, or by a rule of thumb.

    Raises:
        UsageError: an unknown GPU, several without a kind on a machine that has none, or a batch that so many cannot
            share.
    """
    inspection = inspect_teacher(source)
    student = _design(source, inspection, recipe)
    wanted = recipe.compute.device
    device = "cuda" if gpu is not None else choose_device("auto").type if wanted == "auto" else wanted
    layout = layout_of(recipe, engine=engine, zero=zero, num_gpus=num_gpus, on_gpu=device == "cuda")
    if num_gpus > 1 and device != "cuda":
        raise UsageError(
            f"--gpus: found {num_gpus} on a plan for {device}, expected 1", hint="--gpu H100 says which GPU they are"
        )
    machine = Machine(
        device=device,
        gpu=_gpu_at_hand(device) if gpu is None else find_gpu(gpu),
        flops_per_second=flops_per_second,
        utilisation=utilisation,
        price_per_hour=price_per_hour,
        memory_bytes=_memory_bytes(),
        free_bytes=None if output is None else disk.free_bytes(output),
    )
    footprint = _footprint(inspection, student, recipe) if count else None
    return make_plan(inspection.spec, student, recipe, machine, layout, footprint, _makes_whole_logits(inspection))


def _expected(
    inspection: Inspection, student: StudentSpec, recipe: Recipe, device: str, num_processes: int
) -> dict[str, Any]:
    """The plan that goes into a run; without a GPU, seconds of counting would be felt."""
    machine = Machine(device, _gpu_at_hand(device), memory_bytes=_memory_bytes())
    layout = layout_of(recipe, engine="auto", zero=None, num_gpus=num_processes, on_gpu=device == "cuda")
    footprint = _footprint(inspection, student, recipe) if device == "cuda" else None
    return make_plan(inspection.spec, student, recipe, machine, layout, footprint, _makes_whole_logits(inspection))


def _makes_whole_logits(inspection: Inspection) -> bool:
    return inspection.adapter.logits.unknown is not None


def _memory_bytes() -> int | None:
    """The memory of this machine, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_at_hand(device: str) -> Gpu | None:
    if device != "cuda" or not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return gpu_at_hand(facts.name, facts.total_memory)


def _footprint(inspection: Inspection, student: StudentSpec, recipe: Recipe) -> Footprint | None:
    """Activations counted by the family's own code; None where it cannot run without numbers: routers need them."""
    if inspection.spec.active_parameters < inspection.spec.num_parameters:
        return None
    return count_footprint(inspection.config, inspection.adapter, student, recipe)


def convert(
    source: str,
    recipe: Recipe,
    *,
    output: Path | None,
    resume: str,
    report: Report,
    hang_timeout: float = 0.0,
    disk_wait: float = 0.0,
    world: World | None = None,
    prepared: Path | None = None,
    track: Sequence[str] = (),
    track_project: str = PROJECT,
) -> RunFolder:
    """Convert a teacher; where several processes work on it, each makes the same call.

    Args:
        source: the teacher: a Hub id or a folder.
        recipe: the resolved recipe.
        output: the run's folder; None for ``runs/<student name>``.
        resume: ``auto`` continues a run of the same teacher and recipe; ``never`` wants a fresh folder.
        report: receives a line for every step of the way.
        hang_timeout: seconds without progress after which the process ends with exit code 75; 0 for never.
        disk_wait: seconds to wait for space where the disk is full at a checkpoint.
        world: the processes, which share a file system; None for this one alone.
        prepared: where tokenised text may lie that `mohawkify data prepare` made.
        track: trackers that get the metrics as well, by name.
        track_project: the project that trackers show the run in.

    Returns:
        The finished run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        MohawkifyError: anything foreseeable; nothing is left half-written.
    """
    require_trackers(track)
    world = world or World()
    with Shutdown() as stop:
        try:
            return _convert(
                source,
                recipe,
                output,
                resume,
                report,
                hang_timeout,
                disk_wait,
                prepared,
                track if world.is_rank0 else (),
                track_project,
                stop,
                world,
            )
        except KeyboardInterrupt:
            stop.check("outside of training; nothing is half-written")
            raise


def _convert(
    source: str,
    recipe: Recipe,
    output: Path | None,
    resume: str,
    report: Report,
    hang_timeout: float,
    disk_wait: float,
    prepared: Path | None,
    track: Sequence[str],
    track_project: str,
    stop: Shutdown,
    world: World,
) -> RunFolder:
    report = report if world.is_rank0 else lambda line: None
    require_even_shares(recipe, world)
    engine = choose_engine(recipe.compute, world)
    require_agreeing_settings(recipe, world)
    inspection = world.rank0_first(lambda: inspect_teacher(source))
    student = _design(source, inspection, recipe)
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
        for key, value in unheeded_settings(recipe.compute, engine).items():
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


def _design(source: str, inspection: Inspection, recipe: Recipe) -> StudentSpec:
    distill = recipe.stages.distill
    if inspection.spec.tie_word_embeddings and distill.num_steps and set(distill.train) == {"head"}:
        raise RecipeError(
            "stages.distill.train: found head alone, and this teacher's head is its embedding",
            hint="name embedding too, and both learn as one",
        )
    name = student_name(source, recipe)
    return design_student(name, inspection.spec, inspection.config, inspection.adapter, recipe.student)


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
    planned = _expected(inspection, student, recipe, device.type, world.size)
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
