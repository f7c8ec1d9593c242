"""What the processes of these tests do: tiny conversions under every engine."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.errors import NumericsError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent, model_inputs
from mohawkify.recipe.schema import AlignRecipe, DistillRecipe, OptimizerRecipe, OrientRecipe, StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.train.checks import require_finite, require_gradients
from mohawkify.train.engines.deepspeed_config import EngineFacts, engine_config
from mohawkify.train.engines.deepspeed_engine import DeepSpeedEngine, ZeroSettings
from mohawkify.train.engines.engine import Engine, LocalEngine
from mohawkify.train.engines.fsdp_engine import FsdpEngine, FsdpSettings
from mohawkify.train.engines.sharded_teacher import shard_teacher
from mohawkify.train.watchdog import DeadWeightCheck
from tests.tiny import packed, tiny_teacher

CPU = torch.device("cpu")
HYBRID = "-heads"  # behind a family: with some heads of attention beside the mixers
# A larger rate makes rounding grow: one process with another micro-batch then differs by 5e-4 after five steps.
RATE = 1e-4
BATCH = 4
OPTIMIZER = OptimizerRecipe()
STAGE: dict[str, Any] = {"tokens": 1000, "sequence_length": 24, "batch_sequences": BATCH, "learning_rate": RATE}
ENGINES = ("zero-0", "zero-1", "zero-2", "zero-3", "fsdp")
STAGES = ("orient", "align", "distill")


def make_teacher(family: str, **changes: Any) -> PreTrainedModel:
    """Llama with a tied head, grouped keys and an odd number of biases; Qwen2 with a head of its own."""
    family = family.removesuffix(HYBRID)
    odd = {"mlp_bias": True, "intermediate_size": 49} if family == "llama" else {}
    return tiny_teacher(family, **{"num_hidden_layers": 2, **odd, **changes})


def make_pair(family: str, folder: Path, **changes: Any) -> TeacherStudent:
    """The same teacher and student in every process; the folder holds the teacher."""
    torch.manual_seed(0)
    teacher = make_teacher(family, **changes)
    inspection = resolve_teacher(str(folder))
    adapter = inspection.adapter
    keep = {"heads": ((0, 1), (1, 0), (1, 3))} if family.endswith(HYBRID) else {}
    recipe = StudentRecipe.model_validate({"state_size": 16, "keep": keep})
    spec = design_student("tiny", inspection.spec, inspection.config, adapter, recipe)
    return TeacherStudent(teacher, build_student(teacher, adapter, spec, "attention", seed=0), spec, adapter)


def make_stage(name: str, pair: TeacherStudent) -> Objective:
    if name == "orient":
        return MatrixObjective(pair, OrientRecipe(**STAGE))
    return (
        HiddenStateObjective(pair, AlignRecipe(**STAGE))
        if name == "align"
        else LogitsObjective(pair, DistillRecipe(**STAGE))
    )


def make_engine(
    kind: str,
    stage: Objective,
    world: World,
    *,
    precision: str = "fp32",
    offload: str = "none",
    optimizer: OptimizerRecipe = OPTIMIZER,
) -> Engine:
    """An engine by the name tests use: ``single``, ``zero-N`` or ``fsdp``."""
    pair = stage.models
    args = (pair.student, stage.parameters(), optimizer, precision, CPU)
    if kind == "single":
        return LocalEngine(*args)
    layers = find_layers(pair.student, pair.spec.layers)
    if kind == "fsdp":
        return FsdpEngine(*args, FsdpSettings(world, layers))
    facts = EngineFacts(optimizer, RATE, precision, BATCH, 1, world.size, zero=int(kind[-1]), offload=offload)
    # Tiny parameters would otherwise all stay whole.
    config = engine_config(facts, {"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    backwards = BATCH // world.size if stage.has_one_backward else None
    return DeepSpeedEngine(*args, ZeroSettings(world, layers, config, backwards))


def take_step(stage: Objective, engine: Engine, world: World, step: int) -> list[float]:
    """One step on this process's rows of a batch, row by row; the loss and the norm of the gradients."""
    loss = accumulate(stage, engine, world, step)
    return [loss, engine.step(RATE)]


def accumulate(stage: Objective, engine: Engine, world: World, step: int) -> float:
    """The passes of a step; the loss of all processes."""
    whole = packed(length=24 + step, batch=BATCH)
    whole.loss_mask[0, 10:] = False  # rows weigh differently
    mine = Batch(*(tensor[world.rank :: world.size] for tensor in whole))
    loss = 0.0
    with engine.accumulating():
        for row in range(len(mine.input_ids)):
            part = Batch(*(tensor[row : row + 1] for tensor in mine))
            share = stage.weight(part) / stage.weight(whole)

            def backward(part_loss: Tensor, share: float = share) -> None:
                engine.backward(part_loss * share)

            with engine.autocast():
                metrics = stage.run(part, Runner(backward, engine.call))
            loss += float(metrics["loss"]) * share
    return world.sum({"loss": loss})["loss"]


def several(world: World, kind: str, calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The answers of several of the functions below."""
    return {name: function(world, kind, *args) for name, (function, *args) in calls.items()}


def run_stages(
    world: World, kind: str, family: str, folder: Path, num_steps: int, offload: str = "none"
) -> dict[str, list[list[float]]]:
    """All three stages in a row over one student: losses and norms of every step."""
    pair = make_pair(family, folder)
    found = {}
    for name in STAGES:
        stage = make_stage(name, pair)
        engine = make_engine(kind, stage, world, offload=offload)
        found[name] = [take_step(stage, engine, world, step) for step in range(num_steps)]
        engine.close()
    return found


class Saved(NamedTuple):
    """What a checkpoint would hold, as arrays that travel between processes."""

    parameters: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


class Lazy(Mapping[str, Tensor]):
    """Tensors read only when they are asked for, as from a file."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def save(engine: Engine) -> Saved:
    arrays = [
        {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
        for tensors in (engine.parameters(), engine.state())
    ]
    return Saved(*arrays)


def carry_on(
    world: World, kind: str, family: str, folder: Path, stage_name: str, saved: Saved | None, first: int, num_steps: int
) -> tuple[Saved | None, list[list[float]], Saved]:
    """Load a checkpoint, give it back, take some steps; what was given back, losses and norms, a new checkpoint."""
    stage = make_stage(stage_name, make_pair(family, folder))
    engine = make_engine(kind, stage, world)
    given_back = None
    if saved is not None:
        engine.load_parameters(Lazy(saved.parameters))
        engine.load_state(Lazy(saved.state))
        given_back = save(engine)
    found = [take_step(stage, engine, world, step) for step in range(first, first + num_steps)]
    return given_back, found, save(engine)


def meet_a_nan(world: World, kind: str, family: str, folder: Path) -> dict[str, Any]:
    """A step whose gradient is not a number in one process, between two sound ones."""
    stage = make_stage("align", make_pair(family, folder))
    engine = make_engine(kind, stage, world)
    take_step(stage, engine, world, 0)
    before = save(engine)
    backward = engine.backward
    if world.rank == world.size - 1:
        engine.backward = lambda loss: backward(loss * float("nan"))  # type: ignore[method-assign]
    accumulate(stage, engine, world, 1)
    engine.backward = backward  # type: ignore[method-assign]
    norm = engine.step(RATE)
    after = save(engine)
    return {"norm": norm, "before": before, "after": after, "next": take_step(stage, engine, world, 2)}


def lose_a_number(world: World, kind: str, family: str, folder: Path) -> tuple[str, Saved, Saved]:
    """A step whose loss is not a number in one process: what each says of it, and the weights before and after."""
    stage = make_stage("align", make_pair(family, folder))
    engine = make_engine(kind, stage, world)
    before, run = save(engine), stage.run
    if world.rank == world.size - 1:
        stage.run = lambda *given: {**run(*given), "loss": torch.tensor(math.nan)}  # type: ignore[method-assign]
    said = ""
    try:
        require_finite({"loss": accumulate(stage, engine, world, 0)}, "step 1", {}, [])
    except NumericsError as error:
        said = error.message
    return said, before, save(engine)


def lose_gradients(world: World, kind: str, family: str, folder: Path) -> str:
    """Break the engine so that all layers but the last lose their gradients; what the guard says of it."""
    stage = make_stage("align", make_pair(family, folder))
    engine: Any = make_engine(kind, stage, world)
    trained = list(stage.parameters())
    accumulate(stage, engine, world, 0)
    require_gradients(engine, trained, world, "step 1")
    engine.step(RATE)
    if kind in ("zero-1", "zero-2"):
        engine._adding_gradients = nullcontext  # what DeepSpeed does by itself
    else:
        backward, layers = engine.backward, itertools.cycle((False, True))
        engine.backward = lambda loss: backward(loss) if next(layers) else None
    accumulate(stage, engine, world, 1)
    try:
        require_gradients(engine, trained, world, "step 2")
    except NumericsError as error:
        return error.message
    return "nothing"


def keep_gradients(world: World, kind: str, family: str, folder: Path) -> list[list[float]]:
    """Stage 2 with ZeRO-3's buffer of gradients left as DeepSpeed leaves it: every layer moves, but wrongly."""
    stage = make_stage("align", make_pair(family, folder))
    engine: Any = make_engine(kind, stage, world)
    engine._clear_gradients = lambda: None
    return [take_step(stage, engine, world, step) for step in range(3)]


def watch_motion(world: World, kind: str, family: str, folder: Path) -> str:
    """Every weight moves in two steps; without a step none does, which all processes say."""
    pair = make_pair(family, folder)
    stage = make_stage("align", pair)
    engine = make_engine(kind, stage, world)
    trained = list(stage.parameters())
    frozen = [name for name, _ in pair.student.named_parameters() if name not in trained]
    accumulate(stage, engine, world, 0)
    watch = DeadWeightCheck(engine, trained, frozen, world)
    engine.step(RATE)
    take_step(stage, engine, world, 1)
    watch.add_step(RATE)
    watch.check("step 2")
    try:
        watch.check("step 3")
    except NumericsError as error:
        return error.message
    return "nothing"


class _DirectHead(torch.autograd.Function):
    """A loss that reads the head's weight directly and makes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_bld: Tensor, weight_vd: Tensor) -> Tensor:
        logits = hidden_bld.flatten(0, 1) @ weight_vd.T
        ctx.save_for_backward((2 * logits @ weight_vd).view_as(hidden_bld), 2 * logits.T @ hidden_bld.flatten(0, 1))
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return gradient * hidden_gradient, gradient * weight_gradient


class DirectHead(LogitsObjective):
    """A stage whose loss uses the head without calling it."""

    def run(self, batch: Batch, runner: Runner) -> dict[str, Tensor]:
        student = self.models.student

        def loss() -> Tensor:
            hidden = student.base_model(**model_inputs(student, batch, self.models.spec)).last_hidden_state
            return _DirectHead.apply(hidden, student.get_output_embeddings().weight) / 1e3

        value = runner.call(loss)
        runner.backward(value)
        return {"loss": value.detach()}


def use_the_head(world: World, kind: str, family: str, folder: Path) -> list[list[float]]:
    stage = DirectHead(make_pair(family, folder), DistillRecipe(**STAGE))
    engine = make_engine(kind, stage, world)
    return [take_step(stage, engine, world, step) for step in range(2)]


def in_half(world: World, kind: str, family: str, folder: Path) -> list[list[float]]:
    """Steps of stages 1 and 3 in bf16."""
    pair = make_pair(family, folder)
    found = []
    for name in ("orient", "distill"):
        stage = make_stage(name, pair)
        engine = make_engine(kind, stage, world, precision="bf16")
        found += [take_step(stage, engine, world, step) for step in range(2)]
        engine.close()
    return found


def stop_and_go_on(world: World, kind: str, family: str, folder: Path) -> tuple[Saved, Saved]:
    """Stage 1 of three steps, and the same stopped after two; what both come to."""
    _, _, whole = carry_on(world, kind, family, folder, "orient", None, 0, 3)
    _, _, half = carry_on(world, kind, family, folder, "orient", None, 0, 2)
    everywhere: list[Any] = [half]
    distributed.broadcast_object_list(everywhere)  # only the main process has it
    _, _, resumed = carry_on(world, kind, family, folder, "orient", everywhere[0], 2, 1)
    return whole, resumed


def with_sharded_teacher(world: World, kind: str, how: str, family: str, folder: Path) -> dict[str, list[list[float]]]:
    """A step of every stage with a teacher in parts; losses and norms, and how much of the teacher is here."""
    pair = make_pair(family, folder)
    size = sum(parameter.numel() for parameter in pair.teacher.parameters())
    if how != "whole":
        shard_teacher(pair.teacher, pair.spec.layers, how, CPU, world)  # type: ignore[arg-type]
    found = {}
    for name in STAGES:
        stage = make_stage(name, pair)
        engine = make_engine(kind, stage, world)
        found[name] = [take_step(stage, engine, world, 0)]
        engine.close()
    here = sum(local_numel(parameter) for parameter in pair.teacher.parameters())
    return {**found, "size": [[float(here), float(size)]]}


def local_numel(parameter: Any) -> int:
    """How many numbers of a parameter this process holds."""
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


LENGTH = 1024
LONG = {"max_position_embeddings": LENGTH}
_MALLOC_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def peak_bytes(world: World, kind: str, teachers: dict[int, tuple[Path, dict[str, Any]]]) -> dict[str, tuple[int, ...]]:
    """By how much a step of stages 1 and 2 exceeds the memory of what is there before it, for each teacher.

    The step before it has made moments and buffers. Larger pieces of memory go back to the system as soon as they are
    freed, so that what the system counts is what is in use.
    """
    ctypes.CDLL(None).mallopt(_MALLOC_MMAP_THRESHOLD, 65536)
    batch = packed(length=LENGTH, batch=1)
    found: dict[str, tuple[int, ...]] = {"orient": (), "align": ()}
    for folder, changes in teachers.values():
        pair = make_pair("llama", folder, **changes)
        for name in found:
            stage = make_stage(name, pair)
            engine = make_engine(kind, stage, world)
            for _ in range(2):
                before = _memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
                with engine.accumulating():
                    stage.run(batch, Runner(engine.backward, engine.call))
                engine.step(RATE)
            found[name] += (_memory("VmHWM") - before,)
            engine.close()
    return found


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
