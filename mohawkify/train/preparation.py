"""From a teacher's name and a recipe to a conversion that can train: the folder, the models, the text."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mohawkify.data.corpus import Corpus
from mohawkify.data.stage_text import TextReader, epochs_needed, stage_ranges
from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.data.write_corpus import UNFINISHED
from mohawkify.distributed.device import choose_device
from mohawkify.distributed.process_group import World
from mohawkify.errors import MohawkifyError, RecipeError, TeacherError, UsageError
from mohawkify.files import atomic, disk
from mohawkify.files.lock import run_lock
from mohawkify.mixers.kinds import use_kernels
from mohawkify.objectives.objective import TeacherStudent
from mohawkify.ops import dispatch
from mohawkify.planning.planning import plan_run, student_of
from mohawkify.recipe.loading import comparable_text, dump_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RUNS, RunFolder, changed_files, run_identity
from mohawkify.student.build import build_student, checkpoint_activations
from mohawkify.student.keep import is_open
from mohawkify.student.student_spec import StudentSpec
from mohawkify.student.verify import verify_family
from mohawkify.teacher.lm_head import verify_head
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.teacher.soundness import require_sound
from mohawkify.train.begin import begin_with
from mohawkify.train.calibrate import calibrations_of
from mohawkify.train.conversion import Conversion, ConvertOptions, ignore
from mohawkify.train.engines.choice import (
    choose_engine,
    ignored_settings,
    require_agreeing_settings,
    require_even_shares,
)
from mohawkify.train.saving import rotate_checkpoints
from mohawkify.train.second_teacher import (
    FinalTeacher,
    SecondTeacher,
    final_teacher_hashes,
    find_final_teacher,
    require_fitting_text,
    require_fitting_tokens,
)


@dataclass(frozen=True)
class Request:
    """A requested conversion that is possible, as far as configurations show.

    Args:
        recipe: the resolved recipe.
        options: how it runs; nothing is reported outside of the main process.
        world: the processes.
        teacher: resolved from its configuration; its weights may not be here yet.
        student: the student's facts.
        device: where models and batches will be.
        run: the folder.
        is_new: whether this run makes its folder.
    """

    recipe: Recipe
    options: ConvertOptions
    world: World
    teacher: ResolvedTeacher
    student: StudentSpec
    device: torch.device
    run: RunFolder
    is_new: bool

    def locked(self) -> AbstractContextManager[object]:
        """Hold the run's lock, in the main process; a second run in the folder is refused."""
        return run_lock(self.run.path) if self.world.is_rank0 else nullcontext()


def read_request(source: str, recipe: Recipe, options: ConvertOptions, world: World) -> Request:
    """Check the request before anything is read or written but the teacher's configuration.

    Raises:
        MohawkifyError: processes, engine, device or kernels do not fit the recipe, or the teacher has no family.
    """
    if is_open(recipe.student.keep):
        raise RecipeError("student.keep: found layers or heads to be chosen, expected their numbers")
    options = options if world.is_rank0 else replace(options, report=ignore)
    require_even_shares(recipe, world)
    choose_engine(recipe.compute, world)
    require_agreeing_settings(recipe, world)
    teacher = world.rank0_first(lambda: resolve_teacher(source))
    student = student_of(teacher, recipe)
    device = choose_device(recipe.compute.device)
    dispatch.require(recipe.compute.kernels, device)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    run = RunFolder(options.output or RUNS / student.name)
    return Request(recipe, options, world, teacher, student, device, run, not run.path.exists())


def prepare(request: Request) -> Conversion | None:
    """Claim the run's folder, load the teacher, build the student, read the text; the caller holds the lock.

    Returns:
        The conversion; None where the run is already finished.

    Raises:
        MohawkifyError: anything foreseeable; a folder that was made for this run is removed.
    """
    run, recipe, world, report = request.run, request.recipe, request.world, request.options.report
    try:
        teacher = world.rank0_first(lambda: request.teacher.fetch("weights"))
        require_sound(teacher)
        final_teacher, facts = _hashed_teachers(request, teacher)
        identity = world.on_rank0(lambda: _open(request, facts))
        if identity is None:
            return None
        conversion = _load(request, identity, teacher, final_teacher)
    except MohawkifyError:
        # Nothing was trained: a folder made for this run would refuse the corrected command. But text that is half
        # tokenised is worth keeping: the same command goes on with it.
        if world.is_rank0 and request.is_new and not any(run.corpora.glob(f"{UNFINISHED}*/*")):
            atomic.remove_directory(run.path)
        raise
    engine = choose_engine(recipe.compute, world)
    if world.size > 1:
        report(f"training in {world.size} processes, engine {engine}")
    for key, value in ignored_settings(recipe.compute, engine).items():
        report(f"compute.{key} {value} has no effect on the engine {engine}, which --engine auto chose here")
    return conversion


def _hashed_teachers(request: Request, teacher: ResolvedTeacher) -> tuple[FinalTeacher | None, dict[str, Any]]:
    """The second teacher, if any, and what teacher.json records: the first one's facts and the hashes of all files."""
    world, folder = request.world, teacher.require_folder()
    is_first_here = world.local_rank == 0  # one process on every machine reads all bytes
    files = same_everywhere(teacher.file_hashes if is_first_here else None, f"the teacher in {folder}", world)
    text = same_everywhere(teacher.text_hashes if is_first_here else None, f"the tokenizer in {folder}", world)
    final_teacher = world.rank0_first(lambda: find_final_teacher(request.recipe))
    own = final_teacher_hashes(final_teacher) if is_first_here else None
    final_files = same_everywhere(own, "the second teacher", world)
    facts = {**teacher.spec.to_json(), "folder": str(folder.resolve()), "files": files, "text_files": text}
    facts |= {"gguf": dict(teacher.gguf)} if teacher.gguf else {}
    return final_teacher, facts | ({"final_teacher_files": final_files} if final_files else {})


def same_everywhere(own: dict[str, str] | None, what: str, world: World) -> dict[str, str]:
    """The main process's hashes of files that every machine has its own copy of.

    Args:
        own: the hashes of this machine's; None where another of its processes reads them.
        what: the files, for the message.
        world: the processes.

    Raises:
        TeacherError: the copies differ.
    """
    first = world.on_rank0(lambda: own)
    assert first is not None
    if own is not None and own != first:
        raise TeacherError(f"{what} is on {platform.node()} not what the main process has")
    return first


def _open(request: Request, facts: dict[str, Any]) -> str | None:
    """Claim the run's folder and clean it; returns the run's identity, or None where the run is finished."""
    run, recipe = request.run, request.recipe
    atomic.ensure_writable(run.path)
    identity = _claim(run, recipe, facts, request.options.resume)
    if run.is_finished:
        run.checked_final()
        return None
    atomic.sweep_leftovers(run.path)  # of a run that was refused, and killed while it was removed
    for folder in (run.path, run.checkpoints, run.corpora):
        atomic.sweep_temporaries(folder, alone=True)
    rotate_checkpoints(run, recipe)  # a kill may have come before the last rotation
    planned = plan_run(request.teacher, request.student, recipe, request.device.type, request.world.size)
    atomic.write_json(run.plan_file, planned)
    atomic.write_json(run.teacher_file, facts)
    atomic.write_json(run.student_file, request.student.to_json())
    return identity


def _claim(run: RunFolder, recipe: Recipe, facts: dict[str, Any], resume: str) -> str:
    """Take a fresh folder, or continue a run of the same recipe and teacher; returns a hash of both.

    Settings that change a result by rounding only may differ: recipe.yaml then records the new ones.
    """
    text = dump_recipe(recipe)
    hashes, text_files = facts["files"] | facts.get("final_teacher_files", {}), facts["text_files"]
    if run.recipe_file.is_file():
        if resume == "never":
            raise UsageError(f"{run.path} already holds a run", hint="choose another --output, or --resume auto")
        recorded = run.teacher_files() if run.teacher_file.is_file() else hashes
        recorded_text = run.text_files() if run.teacher_file.is_file() else None
        changed_text = [] if recorded_text is None else changed_files(recorded_text, text_files)
        is_same_recipe = comparable_text(run.recipe()) == comparable_text(recipe)
        for is_same, what in (
            (is_same_recipe, "recipe"),
            (recorded == hashes, "teacher"),
            (not changed_text, f"{', '.join(changed_text)} of its teacher"),
        ):
            if not is_same:
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


def _load(request: Request, identity: str, resolved: ResolvedTeacher, final_teacher: FinalTeacher | None) -> Conversion:
    """Read tokenizer and text, load the teacher, build the student."""
    recipe, options, world, spec = request.recipe, request.options, request.world, request.student
    adapter, device, vocab_size = resolved.adapter, request.device, resolved.spec.vocab_size
    folder, tokenizer = resolved.require_folder(), resolved.tokenizer
    text = TextReader(
        recipe, tokenizer, request.run.corpora, folder, vocab_size, options.prepared, report=options.report
    )
    text.require_files()
    world.on_rank0(lambda: _require_room(request.run, text))
    note = final_teacher and require_fitting_tokens(final_teacher, resolved)
    if note:
        options.report(note)
    if resolved.gguf and resolved.gguf["quantised"]:
        types = ", ".join(resolved.gguf["types"])
        options.report(f"the teacher's weights were quantised ({types}): the student learns from what that left")
    options.report(f"loading the teacher from {folder}")
    dtype = torch.bfloat16 if recipe.compute.precision == "bf16" else torch.float32
    is_sharded = recipe.compute.shard_teacher and world.size > 1
    load_device = torch.device("cpu") if is_sharded else device

    def load_first() -> PreTrainedModel:
        first = load_teacher(resolved, dtype=dtype, device=load_device)
        if is_sharded:
            _shard(first, spec.layers, request)
        return first

    def load_final() -> PreTrainedModel:
        assert isinstance(final_teacher, SecondTeacher)
        second = final_teacher.load(dtype, load_device)
        if is_sharded:
            _shard(second, final_teacher.teacher.adapter.layers, request)
        return second

    teacher = load_teacher(resolved, dtype=dtype, device=load_device)
    student = build_student(teacher, adapter, spec, recipe.student.start, recipe.seed)
    if recipe.student.begin is not None:
        options.report(f"beginning with the student of {recipe.student.begin}")
        begin_with(student, recipe.student.begin)
    models = TeacherStudent(teacher, student, spec, adapter, recipe.compute.kernels)
    calibrations = calibrations_of(models) if recipe.student.start == "calibrated" else {}
    verify_head(teacher, adapter, vocab_size)
    if adapter.autodetected:
        options.report(f"no file in adapters/ for {spec.teacher_type}: proving what its modules say on the weights")
        verify_family(teacher, student, adapter, vocab_size)
    if is_sharded:  # only now: the student is built from whole weights
        student.to(device)  # type: ignore[arg-type]
        _shard(teacher, spec.layers, request)
    if recipe.compute.activation_checkpointing:
        checkpoint_activations(student, spec.layers)
    options.report("reading the text")
    corpora, held_out = world.rank0_first(lambda: (text.training(), text.held_out()))
    _require_text(request, corpora, final_teacher)
    world.on_rank0(lambda: atomic.write_json(request.run.text_file, text.record()))
    use_kernels(student, recipe.compute.kernels)
    return Conversion(
        run=request.run,
        recipe=recipe,
        options=options,
        identity=identity,
        models=models,
        tokenizer=tokenizer,
        corpora=corpora,
        held_out=held_out,
        device=device,
        world=world,
        final_teacher=final_teacher,
        load_first=load_first,
        load_final=load_final,
        calibrations=calibrations,
    )


def _require_text(request: Request, corpora: dict[str, Corpus], final_teacher: FinalTeacher | None) -> None:
    """Refuse text that differs between machines, or that cached logits are not of; report how much there is."""
    recipe = request.recipe
    same_everywhere({name: corpus.fingerprint for name, corpus in corpora.items()}, "the text", request.world)
    for name, corpus in corpora.items():
        epochs = epochs_needed(recipe, name, corpus.num_tokens)
        request.options.report(f"{name}: {corpus.num_tokens:,} tokens" + (f" in {epochs} epochs" if epochs > 1 else ""))
    second = recipe.stages.second_teacher()
    if second is not None and isinstance(final_teacher, TeacherLogits):
        stage = second[0]
        block = recipe.stages.blocks()[stage]
        last = stage_ranges(recipe, corpora)[stage][-1]  # the final phase, which has tokens
        require_fitting_text(final_teacher, last, block.batch_sequences, recipe.seed)


def _require_room(run: RunFolder, text: TextReader) -> None:
    """Refuse a run that the disk cannot hold; for one that has a checkpoint, every further one checks it."""
    if not run.checkpoints.is_dir():
        planned = atomic.read_json(run.plan_file)["disk_bytes"]
        disk.require_space(run.path, planned["checkpoints"] + planned["final"] + text.bytes_to_write())


def _shard(teacher: PreTrainedModel, layers: str, request: Request) -> None:
    """Spread a teacher over the processes, by the library that trains the student."""
    from mohawkify.train.engines.sharded_teacher import shard_teacher

    engine = choose_engine(request.recipe.compute, request.world)
    shard_teacher(teacher, layers, "fsdp" if engine == "fsdp" else "deepspeed", request.device, request.world)
