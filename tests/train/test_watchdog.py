"""The watchers of a run: leaping losses, weights that do not move, processes that hang."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from mohawkify.distributed.process_group import World
from mohawkify.errors import HANG, NumericsError
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.engine import LocalEngine
from mohawkify.train.watchdog import FEWEST_LOSSES, SPIKE, DeadWeightCheck, RiseCheck, SpikeDetector


def losses(seed: int = 0, count: int = 200) -> list[float]:
    return list(5.0 + 0.1 * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize("seed", range(20))
def test_a_spike_is_seen_and_ordinary_noise_is_not(seed):
    watch, calm = SpikeDetector(), losses(seed)
    assert [leap for leap in map(watch.add, calm) if leap is not None] == []
    leap = watch.add(5.0 + 20 * 0.1)
    assert leap is not None
    assert leap > SPIKE
    assert watch.add(5.0) is None
    assert watch.add(5.0 + 20 * 0.1) is not None, "one spike must not hide the next"


def test_the_first_losses_and_a_falling_loss_are_no_spikes():
    watch = SpikeDetector()
    assert [watch.add(100.0 / (step + 1)) for step in range(300)] == [None] * 300
    fresh = SpikeDetector()
    assert all(fresh.add(loss) is None for loss in [1.0, 50.0] * (FEWEST_LOSSES // 2))


def test_a_watch_that_was_saved_decides_alike():
    whole, calm = SpikeDetector(), [*losses(), 7.5]
    for loss in calm[:120]:
        whole.add(loss)
    restored = SpikeDetector(**asdict(whole))
    assert [whole.add(loss) for loss in calm[120:]] == [restored.add(loss) for loss in calm[120:]]
    assert whole == restored


def parameters(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(40, 30)) for name in names}


def engine_of(trained: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> LocalEngine:
    student = nn.Module()
    for name, parameter in {**trained, **frozen}.items():
        student.register_parameter(name, parameter)
    return LocalEngine(student, trained, OptimizerRecipe(), "fp32", torch.device("cpu"))


def move(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1e-3)


RATE = 1e-3


def watching(trained: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter], rate: float = RATE) -> DeadWeightCheck:
    watch = DeadWeightCheck(engine_of(trained, frozen), trained, frozen, World())
    watch.add_step(rate)
    return watch


def test_weights_that_move_pass_and_each_look_counts_anew():
    trained, frozen = parameters("a", "b"), parameters("c")
    watch = watching(trained, frozen)
    for parameter in trained.values():
        move(parameter)
    watch.check("step 50")
    move(trained["a"])  # at the end of a schedule not every weight need move any more
    watch.check("step 100")
    with pytest.raises(NumericsError, match="no weight has changed by step 150"):
        watch.check("step 150")


def test_a_weight_that_never_moves_is_named():
    trained = parameters("a", "b")
    watch = watching(trained, {})
    move(trained["a"])
    with pytest.raises(NumericsError, match="b has not changed by step 50"):
        watch.check("step 50")


def test_a_rate_below_the_rounding_of_a_weight_moves_it_not_and_that_is_fine():
    trained = {"a": nn.Parameter(torch.zeros(5)), "b": nn.Parameter(torch.full((5,), 1.25))}
    watch = watching(trained, {}, rate=4e-8)  # the last steps of a published schedule
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(4e-8)
    assert torch.equal(trained["b"], torch.full((5,), 1.25))
    watch.check("step 120")
    watch.add_step(1e-5)
    move(trained["a"])
    with pytest.raises(NumericsError, match="b has not changed"):
        watch.check("step 170")


def test_a_stretch_below_rounding_is_fine_but_not_one_without_a_rate():
    trained = {"a": nn.Parameter(torch.full((5,), 1.25)), "b": nn.Parameter(torch.full((5,), 2.5))}
    watch = watching(trained, {})
    for parameter in trained.values():
        move(parameter)
    watch.check("step 50")
    watch.add_step(1e-11)  # the end of a schedule
    watch.check("step 100")
    watch.add_step(RATE)
    with pytest.raises(NumericsError, match="no weight has changed by step 150"):
        watch.check("step 150")
    idle = watching(trained, {}, rate=0.0)
    with pytest.raises(NumericsError, match="no weight has changed by step 50"):
        idle.check("step 50")


def test_of_an_embedding_only_the_rows_that_the_text_reached_are_watched():
    embedding = nn.Parameter(torch.randn(50_000, 8))
    embedding.grad = torch.zeros_like(embedding)
    embedding.grad[[7, 31_111]] = 1.0
    watch = watching({"embedding": embedding}, {})
    with torch.no_grad():
        embedding[7] += 1e-3
    watch.check("step 3")


def test_a_frozen_weight_that_moves_is_named():
    trained, frozen = parameters("a"), parameters("c")
    watch = watching(trained, frozen)
    move(trained["a"])
    move(frozen["c"])
    with pytest.raises(NumericsError, match="c has changed by step 50, though the stage does not train it"):
        watch.check("step 50")


HANGING = """
import sys, threading, time
from mohawkify.train.watchdog import Watchdog
from mohawkify.distributed.process_group import World
with Watchdog(float(sys.argv[1]), "waiting for Godot", World()) as watch:
    for _ in range(int(sys.argv[2])):
        time.sleep(0.2)
        watch.heartbeat()
    if sys.argv[3] == "hang":
        threading.Event().wait()
"""


# It waits for what cannot show that it gets on, and is stopped as Ctrl-Z does, both for longer than its timeout.
WAITING = """
import os, signal, subprocess, time
from mohawkify.train.watchdog import Watchdog
from mohawkify.distributed.process_group import World
with Watchdog(0.8, "waiting for Godot", World()) as watch:
    with watch.paused():
        time.sleep(1.5)
    subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    watch.heartbeat()
"""


def hang(*arguments: str, script: str = HANGING) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_hang_ends_with_its_code_and_all_stacks():
    done = hang("1.5", "10", "hang")
    assert done.returncode == HANG
    assert "no progress for" in done.stderr
    assert "while waiting for Godot" in done.stderr
    assert "threading.py" in done.stderr, "the stack of the thread that hangs"
    assert "most recent call first" in done.stderr


@pytest.mark.parametrize("hang_timeout", ["1.5", "0"])
def test_progress_is_left_alone(hang_timeout):
    assert hang(hang_timeout, "12", "end").returncode == 0


def test_a_process_that_waits_for_a_library_or_was_stopped_is_left_alone():
    done = hang(script=WAITING)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("losses", "rise"),
    [([1.0, 1.1, 0.9, 1.0], None), ([1.0, 1.0, 1.5, 3.0], 3.0), ([3.0, 2.0, 1.0, 3.3], None)],
    ids=["level", "rising", "noise"],
)
def test_a_loss_that_rises_in_the_first_tenth_is_found_once(losses, rise):
    check = RiseCheck(num_steps=40)
    found = [check.add(loss) for loss in [*losses, 50.0, 60.0]]
    assert found == [None, None, None, rise, None, None]
