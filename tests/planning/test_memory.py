"""Planned memory beside measured memory, on small models that really train, and the rules of the planner itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mohawkify.errors import UsageError
from mohawkify.mixers import mamba2
from mohawkify.ops import chunked_kl, constants, matrix_distance, scan
from mohawkify.ops.constants import band_rows
from mohawkify.ops.matrix_distance import orient_loss
from mohawkify.ops.mixing_matrices import MixingMatrix
from mohawkify.ops.scan import scan_chunked
from mohawkify.planning import memory
from mohawkify.planning.activations import count_footprint
from mohawkify.planning.gpus import GPUS, find_gpu, gpu_at_hand
from mohawkify.planning.memory import (
    STAGES,
    Layout,
    Sizes,
    largest_micro_batch,
    memory_parts,
    remedies,
    rule_of_thumb,
)
from mohawkify.planning.planner import longest, trained_parameters
from mohawkify.planning.planning import PlanOptions, plan
from mohawkify.recipe.loading import load_recipe
from mohawkify.student.build import design_student
from mohawkify.teacher.resolve import resolve_teacher
from tests.planning.peaks import CASES, allocated_peak, built, planned_parts
from tests.tiny import save_teacher, tiny_teacher

TOLERANCE = 0.15


def dominating(parts):
    """The part that takes most; weights, gradients and moments count as one."""
    together = {"models": sum(parts[name] for name in ("teacher", "weights", "gradients", "optimizer", "buffers"))}
    together |= {name: parts[name] for name in ("activations", "loss")}
    return max(together, key=together.get)


@pytest.mark.parametrize(
    ("name", "stage", "checkpointing", "most"),
    [
        pytest.param("weights", "orient", False, "models", marks=pytest.mark.full),
        pytest.param("weights", "align", False, "models", marks=pytest.mark.full),
        ("weights", "distill", False, "models"),
        pytest.param("activations", "align", False, "activations", marks=pytest.mark.full),
        pytest.param("activations", "distill", False, "activations", marks=pytest.mark.full),
        ("activations", "distill", True, "activations"),
        pytest.param("activations in bf16", "align", False, "activations", marks=pytest.mark.full),
        pytest.param("activations in bf16", "distill", False, "activations", marks=pytest.mark.full),
        pytest.param("activations in bf16", "distill", True, "activations", marks=pytest.mark.full),
        pytest.param("activations of another family", "align", False, "models", marks=pytest.mark.full),
        pytest.param("activations of another family", "distill", False, "activations", marks=pytest.mark.full),
        ("logits", "distill", False, "loss"),
        ("bands", "orient", False, "activations"),
        pytest.param("bands in bf16", "orient", False, "loss", marks=pytest.mark.full),
    ],
)
def test_planned_memory_is_what_the_allocator_measures(name, stage, checkpointing, most):
    parts = planned_parts(name, stage, checkpointing)
    measured = allocated_peak(name, stage, checkpointing)
    assert dominating(parts) == most
    assert sum(parts.values()) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the system's peak is read from /proc")
def test_planned_memory_is_what_the_system_gives_the_process():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.planning.peaks", "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for stage, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert sum(found["planned"].values()) == pytest.approx(found["measured"], rel=TOLERANCE), stage


# The planner's own rules, on the sizes of a real conversion


@pytest.fixture(scope="module")
def llamba(teacher_configs):
    """Sizes of Llamba-1B's stages, and what a sequence takes by the rule of thumb."""
    inspection = resolve_teacher(str(teacher_configs / "Llama-3.2-1B-Instruct.json"))
    recipe = load_recipe("llamba-1b")
    student = design_student("s", inspection.spec, inspection.config, inspection.adapter, recipe.student)
    lengths = {stage: longest(getattr(recipe.stages, stage)) for stage in STAGES}
    sizes = {}
    for stage in STAGES:
        trained = trained_parameters(stage, getattr(recipe.stages, stage), inspection.spec, student)
        sizes[stage] = Sizes(stage, lengths[stage], inspection.spec, student, trained)
    return sizes, rule_of_thumb(inspection.spec, student, "bf16", lengths)


def total(sizes, layout, footprint):
    return sum(memory_parts(sizes, layout, footprint).values())


def test_one_gpu_holds_everything_of_the_models(llamba):
    sizes, footprint = llamba
    parts = memory_parts(sizes["distill"], Layout(micro_batch=1), footprint)
    student, teacher = 1_405_159_936, 1_235_814_400
    assert parts["teacher"] == 2 * teacher
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * student, 4 * student, 8 * student)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_shards_ever_more(llamba, stage):
    sizes, footprint = llamba
    zeros = [memory_parts(sizes[stage], Layout("deepspeed", zero=zero, num_gpus=8), footprint) for zero in range(4)]
    student, trained = sizes[stage].student, sizes[stage].trained
    assert [parts["weights"] for parts in zeros] == [4 * student] * 3 + [student // 2]
    assert [parts["optimizer"] for parts in zeros] == [8 * trained] + [pytest.approx(12 * trained / 8, abs=1)] * 3
    whole, shared = 4 * trained, pytest.approx(trained / 2, abs=1)
    gradients = [parts["gradients"] for parts in zeros]
    # Stages 1 and 2 sum up the gradients of all layers in every process before any is reduced, but at ZeRO-3.
    assert gradients == [whole, whole, shared if stage == "distill" else whole, shared]


def test_fsdp_shards_everything(llamba):
    sizes, footprint = llamba
    parts = memory_parts(sizes["align"], Layout("fsdp", num_gpus=4), footprint)
    assert parts["weights"] == sizes["align"].student
    assert parts["gradients"] == sizes["align"].trained
    assert parts["optimizer"] == 2 * sizes["align"].trained


def test_a_spread_teacher_keeps_its_embedding(llamba):
    sizes, footprint = llamba
    parts = memory_parts(sizes["align"], Layout("deepspeed", zero=3, num_gpus=4, shard_teacher=True), footprint)
    embedding = 128256 * 2048
    assert parts["teacher"] == (1_235_814_400 - embedding) // 2 + 2 * embedding


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_micro_batch_is_the_largest_that_fits(llamba, stage):
    sizes, footprint = llamba
    layout = Layout(checkpointing=True)
    usable = GPUS["H100"].usable_bytes
    found = largest_micro_batch(sizes[stage], layout, footprint, usable, 128)
    assert found > 1
    assert 128 % found == 0
    assert total(sizes[stage], replace(layout, micro_batch=found), footprint) <= usable
    assert total(sizes[stage], replace(layout, micro_batch=2 * found), footprint) > usable
    assert largest_micro_batch(sizes[stage], layout, footprint, 10**9, 128) == 0
    assert largest_micro_batch(sizes[stage], layout, footprint, 10**15, 128) == 128
    assert largest_micro_batch(sizes[stage], replace(layout, num_gpus=8), footprint, 10**15, 128) == 16


@pytest.mark.parametrize("layout", [Layout(micro_batch=8), Layout("deepspeed", num_gpus=2, micro_batch=8)])
def test_every_remedy_needs_less_in_the_fullest_stage(llamba, layout):
    sizes, footprint = llamba
    found = list(remedies(layout))
    shared = {"teacher"} if layout.num_gpus > 1 else set()
    assert {each.kind for each in found} >= {"checkpointing", "micro", "gpus", "offload"} | shared
    for each in found:
        assert total(sizes["distill"], each.layout, footprint) < total(sizes["distill"], layout, footprint), each.words
        assert replace(layout, **each.fields(layout)) == each.layout


def test_rows_of_a_band_are_those_of_the_operator():
    asked = []

    class Attention:
        def band(self, begin, end, dtype):
            asked.append(end - begin)
            raise StopIteration

    shapes = ((1, 2, 300), (4, 4, 512), (2, 8, 2048))
    for batch, heads, length in shapes:
        parts = [torch.zeros(batch, length, heads, 4)] * 2
        mixing = MixingMatrix(*parts, torch.zeros(batch, length, heads), torch.zeros(heads))
        with pytest.raises(StopIteration):
            orient_loss(mixing, Attention(), None)
    assert asked == [band_rows(*shape) for shape in shapes]


@pytest.mark.parametrize(("width", "state", "length"), [(4, 8, 100), (64, 64, 100), (64, 64, 20), (128, 128, 100)])
def test_chunks_of_the_scan_are_those_of_the_plan(width, state, length):
    x, b, c = (torch.zeros(1, length, 1, size, requires_grad=True) for size in (width, state, state))
    y, _ = scan_chunked(x, b, c, torch.zeros(1, length, 1))
    assert y.grad_fn.chunk_length == mamba2.scan_chunk_length(width, state, length)


def test_operators_and_plan_share_their_functions():
    assert scan.scan_chunk_length is mamba2.scan_chunk_length
    assert matrix_distance.band_rows is memory.band_rows
    assert chunked_kl.chunk_tokens is memory.chunk_tokens


def test_gpus_are_found_by_name_and_by_what_the_driver_calls_them():
    assert find_gpu("h100") is GPUS["H100"]
    with pytest.raises(UsageError, match="found T1000, expected one of H100, H200, A100, 4090"):
        find_gpu("T1000")
    mine = gpu_at_hand("NVIDIA GeForce RTX 4090", 25_000_000_000)
    assert (mine.memory_bytes, mine.flops_per_second) == (25_000_000_000, GPUS["4090"].flops_per_second)
    assert gpu_at_hand("NVIDIA H100 80GB HBM3", 1).bytes_per_second == GPUS["H100"].bytes_per_second
    assert gpu_at_hand("NVIDIA T1000", 4_000_000_000).flops_per_second is None


def test_a_router_of_experts_leaves_the_rule_of_thumb(tmp_path):
    folder = save_teacher(tiny_teacher("mixtral"), tmp_path / "teacher")
    planned = plan(str(folder), load_recipe("demo"), PlanOptions(count=True))
    assert planned["activations_counted"] is False
    assert planned["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "name", ["activations in bf16", pytest.param("activations of another family", marks=pytest.mark.full)]
)
def test_a_shortened_scan_takes_what_the_whole_one_takes(name, monkeypatch):
    case, (pair, teacher) = CASES[name], built(name)
    heads = pair.spec.num_heads
    # Groups of one chunk for two sequences and of two for one; the last one of 200 tokens is incomplete.
    monkeypatch.setattr(constants, "SCAN_GROUP_ELEMENTS", 2 * heads * 16**2)
    short, whole = (
        count_footprint(teacher.config, teacher.adapter, pair.spec, case.recipe(), whole_scan=is_whole)
        for is_whole in (False, True)
    )
    assert short == whole
