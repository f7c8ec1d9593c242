"""Every engine does what plain torch in one process does: two real processes, real DeepSpeed, real FSDP2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mohawkify.errors import NumericsError
from mohawkify.train.world import World
from tests.engines import cases
from tests.engines.processes import run_processes
from tests.tiny import save_teacher

STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny teachers: Llama with a tied head and grouped keys, Qwen2 with biases and a head of its own, Falcon that rebuilds attention."""
    return {
        family: save_teacher(cases.make_teacher(family), tmp_path_factory.mktemp(family))
        for family in ("llama", "qwen2")
    }


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, dict[str, list[list[float]]]]:
    """What plain torch in one process finds."""
    families = ("llama", "qwen2")
    return {family: cases.run_stages(World(), "single", family, folders[family], STEPS) for family in families}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", cases.ENGINES)
def test_two_processes_train_as_one_does(kind, family, folders, alone):
    for found in run_processes(cases.run_stages, 2, kind, family, folders[family], STEPS):
        for stage, expected in alone[family].items():
            for step, pair in enumerate(zip(found[stage], expected, strict=True)):
                assert pair[0] == pytest.approx(pair[1], rel=1e-5), f"{stage}, step {step + 1}: loss, norm"


def same(left: cases.Saved, right: cases.Saved) -> bool:
    return all(
        ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("stage", ["orient", "distill"])
def test_a_run_goes_on_under_any_engine_on_any_number_of_processes(stage, folders):
    family = "llama"
    _, expected, _ = cases.carry_on(World(), "single", family, folders[family], stage, None, 0, 7)
    saved, found = None, []
    links = [("zero-2", 2), ("zero-2", 1), ("zero-3", 2), ("fsdp", 2), ("single", 1), ("zero-1", 2), ("zero-0", 2)]
    for step, (kind, processes) in enumerate(links):
        arguments = (kind, family, folders[family], stage, saved, step, 1)
        given_back, losses, saved_next = run_processes(cases.carry_on, processes, *arguments)[0]
        assert saved is None or same(given_back, saved), f"{kind} changed a checkpoint by loading it"
        found += losses
        saved = saved_next
    for step, pair in enumerate(zip(found, expected, strict=True)):
        assert pair[0] == pytest.approx(pair[1], rel=1e-5), f"{links[step]}: loss, norm"


@pytest.mark.parametrize("kind", ["zero-1", "zero-3", "fsdp"])
def test_on_as_many_processes_a_run_goes_on_to_the_bit(kind, folders):
    arguments = ("llama", folders["llama"], "distill")
    _, _, whole = run_processes(cases.carry_on, 2, kind, *arguments, None, 0, 3)[0]
    _, _, half = run_processes(cases.carry_on, 2, kind, *arguments, None, 0, 2)[0]
    _, _, resumed = run_processes(cases.carry_on, 2, kind, *arguments, half, 2, 1)[0]
    assert same(resumed, whole)


@pytest.mark.parametrize("kind", cases.ENGINES)
def test_a_gradient_that_is_not_finite_anywhere_updates_nothing(kind, folders):
    expected = cases.meet_a_nan(World(), "single", "llama", folders["llama"])
    assert not np.isfinite(expected["norm"])
    for rank, found in enumerate(run_processes(cases.meet_a_nan, 2, kind, "llama", folders["llama"])):
        assert not np.isfinite(found["norm"])
        assert found["next"] == pytest.approx(expected["next"], rel=1e-5)
        if rank == 0:
            assert same(found["before"], found["after"])


@pytest.mark.parametrize("kind", cases.ENGINES)
def test_the_guard_notices_gradients_that_get_lost(kind, folders):
    with pytest.raises(NumericsError, match=r"layers\.0\..* has no gradient at step 2"):
        run_processes(cases.lose_gradients, 2, kind, "llama", folders["llama"])


@pytest.mark.parametrize("kind", cases.ENGINES)
def test_motion_is_watched_in_parts(kind, folders):
    found = run_processes(cases.watch_motion, 2, kind, "llama", folders["llama"])
    assert found == ["no weight has changed by step 3 since the last look"] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", cases.ENGINES)
def test_a_function_may_use_the_heads_weight_directly(kind, family, folders):
    expected = cases.use_the_head(World(), "single", family, folders[family])
    for found in run_processes(cases.use_the_head, 2, kind, family, folders[family]):
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize("kind", cases.ENGINES)
def test_bf16_is_autocast_in_every_engine(kind, folders):
    expected = cases.in_half(World(), "single", "llama", folders["llama"], "none")
    for found in run_processes(cases.in_half, 2, kind, "llama", folders["llama"], "none"):
        assert np.array(found) == pytest.approx(np.array(expected), rel=2e-2)


@pytest.mark.parametrize(("kind", "offload"), [("zero-1", "optimizer"), ("zero-2", "optimizer"), ("zero-3", "all")])
def test_offloading_changes_nothing(kind, offload, folders):
    expected = run_processes(cases.in_half, 2, "fsdp", "llama", folders["llama"], "cpu")[0]
    for found in run_processes(cases.in_half, 2, kind, "llama", folders["llama"], offload):
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize(("family", "kind", "how"), [
    ("llama", "zero-3", "deepspeed"),
    ("qwen2", "zero-3", "deepspeed"),
    ("llama", "fsdp", "fsdp"),
    ("qwen2", "fsdp", "fsdp"),
    ("falcon", "fsdp", "deepspeed"),
    ("falcon", "zero-2", "fsdp"),
])  # fmt: skip
def test_a_teacher_in_parts_teaches_the_same(family, kind, how, folders):
    expected = cases.with_sharded_teacher(World(), "single", "whole", family, folders[family])
    for found in run_processes(cases.with_sharded_teacher, 2, kind, how, family, folders[family]):
        for stage in cases.STAGES:
            assert np.array(found[stage]) == pytest.approx(np.array(expected[stage]), rel=1e-5)
        ((here, size),) = found["size"]
        assert here < 0.75 * size, "the embedding of a tied head stays whole, the rest is halved"
