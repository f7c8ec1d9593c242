"""The memory that real training steps take, measured by PyTorch's allocator and by the system, beside what is planned.

Run as a script in a fresh process it prints what the system measured of a case: `python -m tests.planning.peaks NAME`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Objective, Runner, TeacherStudent
from mohawkify.planning.activations import count_footprint
from mohawkify.planning.memory import Layout, Sizes, memory_parts
from mohawkify.planning.planner import trained_parameters
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.student.build import checkpoint_activations
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.train.engines.engine import LocalEngine
from tests.tiny import packed, tiny_pair

PASSES = 2  # micro-batches of a step


@dataclass(frozen=True)
class Case:
    """A small teacher, its student, and a batch."""

    micro_batch: int
    length: int
    precision: str = "fp32"
    family: str = "llama"
    state: int = 32
    sizes: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        lengths = [f"stages.{stage}.sequence_length={self.length}" for stage in ("orient", "align", "distill")]
        return apply_overrides(
            load_recipe("llamba-1b"),
            [*lengths, "stages.distill.final_phase=null", f"compute.precision={self.precision}"],
        )


WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CASES = {
    "weights": Case(1, 32, sizes={**WIDE, "hidden_size": 256}),
    "activations": Case(4, 256, sizes=WIDE),
    "activations in bf16": Case(4, 256, precision="bf16", sizes={**WIDE, "num_hidden_layers": 3}),
    "activations of another family": Case(3, 200, family="gpt_neox", sizes=WIDE),
    "logits": Case(2, 256, sizes={**WIDE, "hidden_size": 64, "vocab_size": 48000, "num_hidden_layers": 2}),
    "bands": Case(4, 512, sizes={**WIDE, "num_hidden_layers": 2}),
    "bands in bf16": Case(2, 700, precision="bf16", state=8, sizes=NARROW),
    "large": Case(4, 256, sizes={**WIDE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}),
}


@cache
def built(name: str) -> tuple[TeacherStudent, ResolvedTeacher]:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {**case.sizes, "max_position_embeddings": 1024}
        pair = tiny_pair(case.family, Path(folder) / "teacher", student={"state_size": case.state}, **sizes)
        inspection = resolve_teacher(str(Path(folder) / "teacher"))
    if case.precision == "bf16":
        pair.teacher.to(torch.bfloat16)
    return pair, inspection


@cache
def _footprint(name: str) -> Any:
    pair, inspection = built(name)
    return count_footprint(inspection.config, inspection.adapter, pair.spec, CASES[name].recipe())


def planned_parts(name: str, stage: str, checkpointing: bool = False) -> dict[str, int]:
    """What the plan says of a case."""
    case, (pair, inspection) = CASES[name], built(name)
    trained = trained_parameters(stage, getattr(case.recipe().stages, stage), inspection.spec, pair.spec)
    layout = Layout(precision=case.precision, micro_batch=case.micro_batch, checkpointing=checkpointing)
    sizes = Sizes(stage, case.length, inspection.spec, pair.spec, trained)
    return memory_parts(sizes, layout, _footprint(name))


def training_step(name: str, stage: str, checkpointing: bool = False) -> tuple[Callable[[], None], Callable[[], int]]:
    """One optimiser step of a case, to be called; and the bytes of models and moments that lie there between steps."""
    case, (pair, _) = CASES[name], built(name)
    recipe = case.recipe()
    if checkpointing:
        checkpoint_activations(pair.student, pair.spec.layers)
    else:
        pair.student.gradient_checkpointing_disable()
    made: dict[str, Objective] = {
        "orient": MatrixObjective(pair, recipe.stages.orient),
        "align": HiddenStateObjective(pair, recipe.stages.align),
        "distill": LogitsObjective(pair, recipe.stages.distill),
    }
    trained = made[stage].parameters()
    for key, parameter in pair.student.named_parameters():
        parameter.requires_grad_(key in trained)
    engine = LocalEngine(pair.student, trained, recipe.optimizer, case.precision, torch.device("cpu"))
    vocabulary = pair.teacher.config.vocab_size

    def step() -> None:
        for _ in range(PASSES):
            batch = packed(case.length, case.micro_batch, vocabulary=vocabulary)
            with engine.accumulating(), engine.autocast():
                made[stage].run(batch, Runner(engine.backward, engine.call))
        engine.step(1e-4)

    def lasting() -> int:
        tensors: dict[int, Tensor] = {
            id(tensor): tensor
            for model in (pair.teacher, pair.student)
            for tensor in (*model.parameters(), *model.buffers())
        }
        return sum(tensor.nbytes for tensor in (*tensors.values(), *engine.state().values()))

    return step, lasting


def allocated_peak(name: str, stage: str, checkpointing: bool = False) -> int:
    """The most bytes that PyTorch's allocator had given out during a step."""
    step, lasting = training_step(name, stage, checkpointing)
    step()  # the first one makes the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return lasting() + max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def resident_peak(name: str, stage: str) -> int:
    """The most memory that the system gave to this process for a step, beyond what it has before; Linux alone.

    The allocator must return what is freed at once: MALLOC_MMAP_THRESHOLD_=65536 in the environment.
    """
    step, lasting = training_step(name, stage)
    step()
    before = _system_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far
    step()
    return lasting() + _system_bytes("VmHWM") - before


def _system_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {
        each: {"measured": resident_peak(sys.argv[1], each), "planned": planned_parts(sys.argv[1], each)}
        for each in ("orient", "align", "distill")
    }
    print(json.dumps(found))
