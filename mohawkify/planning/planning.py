"""The plan of a conversion, for a machine that is named or for the one at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mohawkify.distributed.device import choose_device
from mohawkify.errors import RecipeError, UsageError
from mohawkify.files import disk
from mohawkify.objectives.trainable import part_of_parameters
from mohawkify.planning.activations import count_footprint
from mohawkify.planning.gpus import UTILISATION, Gpu, find_gpu, gpu_at_hand
from mohawkify.planning.memory import Layout
from mohawkify.planning.planner import Machine, PlanInputs, layout_of, make_plan
from mohawkify.recipe.schema import Recipe
from mohawkify.recipe.stages import StageRecipe
from mohawkify.student.build import design_student
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher


@dataclass(frozen=True)
class PlanOptions:
    """The machine of a plan and its assumptions.

    Args:
        flops_per_second: the sustained speed of everything together; None assumes one.
        gpu: the kind of GPU to plan for; None plans for the machine at hand.
        num_gpus: how many share the work.
        engine: ``auto``, ``single``, ``deepspeed`` or ``fsdp``.
        zero: ZeRO's stage, with DeepSpeed; None for the recipe's, or 3.
        utilisation: part of a GPU's peak arithmetic that is sustained.
        price_per_hour: of one GPU; None plans no cost.
        output: where the run will lie, to compare with its free space; None compares nothing.
        count: whether to count activations with the family's own code, which takes seconds, or by a rule of thumb.
    """

    flops_per_second: float | None = None
    gpu: str | None = None
    num_gpus: int = 1
    engine: str = "auto"
    zero: int | None = None
    utilisation: float = UTILISATION
    price_per_hour: float | None = None
    output: Path | None = None
    count: bool = False


def plan(source: str, recipe: Recipe, options: PlanOptions = PlanOptions()) -> dict[str, Any]:
    """Plan a conversion from the teacher's config.json alone; no weights are read.

    Args:
        source: the teacher: a Hub id, a folder or a config.json.

    Raises:
        UsageError: an unknown GPU, several without a kind on a machine that has none, or a batch that so many cannot
            share.
    """
    teacher = resolve_teacher(source)
    student = student_of(teacher, recipe)
    device = recipe.compute.device
    if options.gpu is not None:
        device = "cuda"
    elif device == "auto":
        device = choose_device("auto").type  # type: ignore[assignment]
    layout = layout_of(recipe, engine=options.engine, zero=options.zero, num_gpus=options.num_gpus)
    if options.num_gpus > 1 and device != "cuda":
        raise UsageError(
            f"--gpus: found {options.num_gpus} on a plan for {device}, expected 1",
            hint="--gpu H100 says which GPU they are",
        )
    machine = Machine(
        device=device,
        gpu=_gpu_at_hand(device) if options.gpu is None else find_gpu(options.gpu),
        flops_per_second=options.flops_per_second,
        utilisation=options.utilisation,
        price_per_hour=options.price_per_hour,
        memory_bytes=memory_bytes(),
        free_bytes=None if options.output is None else disk.free_bytes(options.output),
    )
    return _make_plan(teacher, student, recipe, machine, layout, options.count)


def plan_run(
    teacher: ResolvedTeacher, student: StudentSpec, recipe: Recipe, device: str, num_processes: int
) -> dict[str, Any]:
    """The plan that a run's folder keeps; activations are counted on a GPU only, because counting takes seconds."""
    machine = Machine(device, _gpu_at_hand(device), memory_bytes=memory_bytes())
    layout = layout_of(recipe, engine="auto", zero=None, num_gpus=num_processes)
    return _make_plan(teacher, student, recipe, machine, layout, device == "cuda")


def student_of(teacher: ResolvedTeacher, recipe: Recipe) -> StudentSpec:
    """The student that a recipe makes of a teacher; its name is the recipe's, or the teacher's with ``-mohawk``.

    Raises:
        RecipeError: a stage compares matrices that the mixer does not have, or names a part to train in which nothing
            would learn; or sequences are longer than the teacher's learned positions.
    """
    teacher.spec.require_length("evaluation.sequence_length", recipe.evaluation.sequence_length)
    for name, block in recipe.stages.blocks().items():
        for segment in block.segments():
            teacher.spec.require_length(f"stages.{name}.{segment.length_key}", segment.sequence_length)
    name = recipe.student.name or f"{teacher.name}-mohawk"
    student = design_student(name, teacher.spec, teacher.config, teacher.adapter, recipe.student)
    for stage, block in recipe.stages.blocks().items():
        if block.num_steps and block.objective == "matrix" and not student.matrix_parameters:
            raise RecipeError(
                f"stages.{stage}.tokens: found {block.tokens:,}, expected 0: the mixer {student.kind} has no matrix to"
                " compare with attention"
            )
        if block.num_steps:
            _require_learning(stage, block, student, teacher)
    return student


def _require_learning(stage: str, block: StageRecipe, student: StudentSpec, teacher: ResolvedTeacher) -> None:
    """Refuse a part to train of which the stage trains no parameter; the default names parts that may be missing."""
    named = getattr(block, "train", ())
    if not named or set(named) == set(type(block).model_fields["train"].default or ()):
        return
    grafted = tuple(f"{student.layers}.{index}." for index in student.mixer_layers)
    reached = grafted if block.plans_as == "align" else ""
    modules: Any = teacher.modules
    learning = {part for name, part in part_of_parameters(modules, student).items() if name.startswith(reached)}
    reason, hint = "this student has no such parameters", "leave it out"
    if getattr(block, "target", None) == "mixer":
        learning, reason = {"mixer"}, "target: mixer trains the mixers alone"
    elif teacher.spec.tie_word_embeddings and "embedding" in named:
        learning.add("head")
    idle = [part for part in named if part not in learning]
    if idle == ["head"] and teacher.spec.tie_word_embeddings:
        reason, hint = "this teacher's head is its embedding", "name embedding too, and both learn as one"
    if idle:
        raise RecipeError(f"stages.{stage}.train: found {idle[0]}, of which nothing would learn: {reason}", hint=hint)


def memory_bytes() -> int | None:
    """The memory of this machine, where the system reports it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_at_hand(device: str) -> Gpu | None:
    if device != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return gpu_at_hand(properties.name, properties.total_memory)


def _make_plan(
    teacher: ResolvedTeacher, student: StudentSpec, recipe: Recipe, machine: Machine, layout: Layout, counts: bool
) -> dict[str, Any]:
    footprint = None
    # The family's own code counts; routers of experts need real values to run.
    if counts and teacher.spec.active_parameters == teacher.spec.num_parameters:
        footprint = count_footprint(teacher.config, teacher.adapter, student, recipe)
    makes_whole_logits = teacher.adapter.logits.unknown is not None
    return make_plan(PlanInputs(teacher.spec, student, recipe, machine, layout, makes_whole_logits), footprint)
