"""What the processes of these tests do: tiny conversions under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawkify.data.packing import Batch
from mohawkify.recipe import AlignRecipe, DistillRecipe, OptimizerRecipe, StudentRecipe
from mohawkify.stages.align import Align
from mohawkify.stages.base import Pair, Runner, Stage
from mohawkify.stages.distill import Distill
from mohawkify.stages.orient import Orient
from mohawkify.student.build import build_student, design_student
from mohawkify.student.grafting import find_layers
from mohawkify.teacher.inspect import inspect_teacher
from mohawkify.train.deepspeed_config import EngineFacts, engine_config
from mohawkify.train.deepspeed_engine import DeepSpeedEngine
from mohawkify.train.engine import Engine, LocalEngine
from mohawkify.train.fsdp_engine import FsdpEngine
from mohawkify.train.world import World
from tests.tiny import packed, tiny_teacher

CPU = torch.device("cpu")
# A larger rate makes rounding grow: one process with another micro-batch then differs by 5e-4 after five steps.
RATE = 1e-4
BATCH = 4
OPTIMIZER = OptimizerRecipe()
STAGE: dict[str, Any] = {"tokens": 1000, "sequence_length": 24, "batch_sequences": BATCH, "learning_rate": RATE}
ENGINES = ("zero-0", "zero-1", "zero-2", "zero-3", "fsdp")
STAGES = ("orient", "align", "distill")


def make_pair(family: str, folder: Path) -> Pair:
    """The same teacher and student in every process; the folder holds the teacher."""
    torch.manual_seed(0)
    teacher = tiny_teacher(family)
    inspection = inspect_teacher(str(folder))
    adapter = inspection.adapter
    spec = design_student("tiny", inspection.spec, inspection.config, adapter, StudentRecipe(state_width=16))
    return Pair(teacher, build_student(teacher, adapter, spec, "attention", seed=0), spec, adapter)


def make_stage(name: str, pair: Pair) -> Stage:
    if name == "orient":
        return Orient(pair)
    return Align(pair, AlignRecipe(**STAGE)) if name == "align" else Distill(pair, DistillRecipe(**STAGE))


def make_engine(
    kind: str,
    stage: Stage,
    world: World,
    *,
    precision: str = "fp32",
    offload: str = "none",
    optimizer: OptimizerRecipe = OPTIMIZER,
) -> Engine:
    """An engine by the name tests use: ``single``, ``zero-N`` or ``fsdp``."""
    pair = stage.pair
    args = (pair.student, stage.parameters(), optimizer, precision, CPU)
    if kind == "single":
        return LocalEngine(*args)
    layers = find_layers(pair.student, pair.spec.layers)
    if kind == "fsdp":
        return FsdpEngine(*args, world, layers=layers)
    facts = EngineFacts(optimizer, RATE, precision, BATCH, 1, world.size, zero=int(kind[-1]), offload=offload)
    # Tiny parameters would otherwise all stay whole.
    config = engine_config(facts, {"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    backwards = BATCH // world.size if stage.name == "distill" else None
    return DeepSpeedEngine(*args, world, layers=layers, config=config, backwards_per_step=backwards)


def take_step(stage: Stage, engine: Engine, world: World, step: int) -> list[float]:
    """One step on this process's rows of a batch, row by row; the loss and the norm of the gradients."""
    loss = accumulate(stage, engine, world, step)
    return [loss, engine.step(RATE)]


def accumulate(stage: Stage, engine: Engine, world: World, step: int) -> float:
    """The passes of a step; the loss of all processes."""
    whole = packed(length=24 + step, batch=BATCH)
    whole.counts[0, 10:] = False  # rows weigh differently
    mine = Batch(*(tensor[world.rank :: world.size] for tensor in whole))
    loss = 0.0
    with engine.accumulating():
        for row in range(len(mine.input_ids)):
            part = Batch(*(tensor[row : row + 1] for tensor in mine))
            share = stage.weight(part) / stage.weight(whole)

            def backward(part_loss: Tensor, share: float = share) -> None:
                engine.backward(part_loss * share)

            with engine.autocast():
                figures = stage.run(part, Runner(backward, engine.call))
            loss += float(figures["loss"]) * share
    return world.sum({"loss": loss})["loss"]


def run_stages(world: World, kind: str, family: str, folder: Path, num_steps: int) -> dict[str, list[list[float]]]:
    """All three stages in a row over one student: losses and norms of every step."""
    pair = make_pair(family, folder)
    found = {}
    for name in STAGES:
        stage = make_stage(name, pair)
        engine = make_engine(kind, stage, world)
        found[name] = [take_step(stage, engine, world, step) for step in range(num_steps)]
        engine.close()
    return found
