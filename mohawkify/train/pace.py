"""How many tokens a time allows: a step of every stage measured on random tokens, before there is a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from mohawkify.data.packing import Batch
from mohawkify.distributed.device import choose_device, wait_for
from mohawkify.distributed.process_group import World
from mohawkify.errors import UsageError
from mohawkify.mixers.kinds import use_kernels
from mohawkify.objectives.catalogue import make_objective
from mohawkify.objectives.objective import TeacherStudent
from mohawkify.planning.automatic import automatic_recipe
from mohawkify.planning.planning import PlanOptions, student_of
from mohawkify.planning.rules import Budget, RangeRules, round_count
from mohawkify.recipe.loading import dump_recipe
from mohawkify.recipe.schema import CalibrateRecipe, Recipe
from mohawkify.recipe.stages import StageRecipe
from mohawkify.run.folder import RUNS, RunFolder
from mohawkify.student.build import build_student
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.train.calibrate import CalibrationText, batches_of_passes, calibrate, calibrations_of
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.engines.choice import build_engine
from mohawkify.train.loop import forward_backward

TIMED_TOKENS = 10**6  # of the recipe whose steps are timed: it has all stages
FEW_TOKENS, MANY_TOKENS = 10**4, 10**13
# Of a time: the rest is for loading, reading the text, checkpoints, and steps that take longer than the measured ones.
USED = 0.9
MEASURING = 1 / 3  # the time of a token's measurement over that of its training: two forward passes and no backward


def written_recipe(
    source: str, budget: Budget, overrides: Sequence[str], options: ConvertOptions, world: World | None
) -> Recipe:
    """The recipe that a conversion is to run, which is reported; every process makes the same call.

    A run that is there already has the tokens that were measured for it.

    Args:
        source: the teacher.
        budget: tokens, or a time.
        overrides: values that stand whatever the rules say.
        options: the run's folder.
        world: the processes; None for this one alone.

    Raises:
        UsageError: the budget is too small.
    """
    world = world or World()

    def recipe_of(tokens: int, fits: bool = False) -> Recipe:
        machine = PlanOptions(num_gpus=world.size)
        return automatic_recipe(source, Budget(tokens, budget.seconds), overrides, machine, fits)

    tokens = budget.tokens
    if tokens is None:
        assert budget.seconds is not None
        first = recipe_of(TIMED_TOKENS, True)
        run = RunFolder(options.output or RUNS / student_of(resolve_teacher(source), first).name)
        tokens = world.on_rank0(lambda: _recorded_tokens(run))
        if tokens is None:
            if world.is_rank0:
                options.report("measuring a step of every stage")
            tokens = affordable_tokens(budget.seconds, recipe_of, measured_pace(source, first, world))
    recipe = recipe_of(tokens, True)
    if world.is_rank0:
        for line in dump_recipe(recipe).splitlines():
            options.report(f"  {line}")
    return recipe


def _recorded_tokens(run: RunFolder) -> int | None:
    if not run.recipe_file.is_file():
        return None
    return sum(block.tokens for block in run.recipe().stages.blocks().values())


def affordable_tokens(seconds: float, recipe_of: Callable[[int], Recipe], pace: dict[str, float]) -> int:
    """The most tokens whose recipe takes no longer.

    Args:
        recipe_of: writes the recipe for so many tokens.
        pace: seconds per token, by stage.

    Raises:
        UsageError: the time is too short for any recipe.
    """
    few, many = FEW_TOKENS, MANY_TOKENS
    while round_count(few * 1.01) < many:
        middle = round_count((few * many) ** 0.5)
        if middle in (few, many):
            break
        few, many = (middle, many) if _seconds(recipe_of(middle), pace) <= USED * seconds else (few, middle)
    least = _seconds(recipe_of(few), pace) / USED
    if few == FEW_TOKENS and least > seconds:
        raise UsageError(f"found a time of {seconds:,.0f} s, expected at least {least:,.0f} s on this machine")
    return few


def _seconds(recipe: Recipe, pace: dict[str, float]) -> float:
    """The time of a recipe's stages, of their range tests and of the measurements between them."""
    blocks = {name: block for name, block in recipe.stages.blocks().items() if block.tokens}
    training = sum(pace[name] * block.tokens for name, block in blocks.items())
    tested = {name: block for name, block in blocks.items() if block.learning_rate == "auto"}
    tests = sum(pace[name] * block.tokens * RangeRules().cost(block) for name, block in tested.items())
    return training + tests + (len(blocks) + 1) * MEASURING * pace["distill"] * recipe.evaluation.tokens


def measured_pace(source: str, recipe: Recipe, world: World) -> dict[str, float]:
    """Seconds per token of every stage, on this machine and in these processes; nothing is learned.

    Args:
        source: the teacher.
        recipe: with all stages that are to be timed.
        world: the processes.
    """
    teacher = world.rank0_first(lambda: resolve_teacher(source, need="weights"))
    device, spec = choose_device(recipe.compute.device), student_of(teacher, recipe)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    dtype = torch.bfloat16 if recipe.compute.precision == "bf16" else torch.float32
    loaded = load_teacher(teacher, dtype=dtype, device=device)
    student = build_student(loaded, teacher.adapter, spec, recipe.student.start, recipe.seed)
    models = TeacherStudent(loaded, student, spec, teacher.adapter, recipe.compute.kernels)
    use_kernels(student, recipe.compute.kernels)
    machine: Any = SimpleNamespace(world=world, device=device, recipe=recipe, models=models)
    found = {}
    for name, block in recipe.stages.blocks().items():
        if block.tokens:
            is_closed = isinstance(block, CalibrateRecipe)
            found[name] = world.max((_calibration_pace if is_closed else _step_pace)(machine, block))
    return found


def _random_batch(block: StageRecipe, machine: Any) -> Batch:
    """Random tokens of one document per sequence, on the CPU."""
    shape = (block.batch_sequences, block.sequence_length)
    generator = torch.Generator().manual_seed(0)
    ids_bl = torch.randint(machine.models.teacher.config.vocab_size, shape, generator=generator)
    positions_bl = torch.arange(block.sequence_length).expand(shape).clone()
    return Batch(ids_bl, positions_bl, torch.ones(shape, dtype=torch.bool), torch.zeros(shape[0], dtype=torch.int64))


def _step_pace(machine: Any, block: StageRecipe) -> float:
    """The second of two optimizer steps; the rate is 0."""
    world = machine.world
    rows = block.batch_sequences // world.size
    micro_batch = min(machine.recipe.compute.micro_batch_sequences or rows, rows)
    objective, batch = make_objective(machine.models, block), _random_batch(block, machine)
    engine = build_engine(objective, machine.recipe, micro_batch, machine.device, world)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        with engine.accumulating():
            forward_backward(machine, objective, engine, batch, micro_batch, lambda: None)
        engine.step(0.0)
        wait_for(machine.device)
        seconds = time.perf_counter() - begin
    engine.close()
    return seconds / block.tokens_per_step


def _calibration_pace(machine: Any, block: StageRecipe) -> float:
    """A calibration on two batches; one on more solves no more often, so this is at most too slow."""
    world, calibrations = machine.world, calibrations_of(machine.models)
    batch = _random_batch(block, machine)
    rows = block.batch_sequences // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)

    def read(num_batches: int) -> Generator[Batch]:
        for _ in range(num_batches):
            yield Batch(*(tensor[own].to(machine.device) for tensor in batch))

    begin = time.perf_counter()
    calibrate(machine.models, calibrations, CalibrationText(2, block.sequence_length, read), world)
    wait_for(machine.device)
    each = (time.perf_counter() - begin) / sum(batches_of_passes(calibrations, 2).values())
    return each * sum(batches_of_passes(calibrations, block.num_steps).values()) / block.tokens
