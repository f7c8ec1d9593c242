"""Numbers that are not finite and training that does not train end a run by name, and never reach a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mohawkify.files import atomic
from mohawkify.run import checkpoint
from tests.soak import SEED, chooser, trials
from tests.soak.runs import Tally, figures_of, require_checkpoints, require_one_line

STEPS = {"orient": 2, "align": 2, "distill": 3}
FIRST = {"orient": 0, "align": 2, "distill": 4}
SITES = ("teacher", "student", "gradient", "optimizer", "weight")


def cases() -> list[tuple[str, str, int, int, float]]:
    """Every site in every stage, at the first, a middle and the last of 4 micro-batches, with NaN and infinity."""
    return [
        (site, stage, step, micro_batch, value)
        for site in SITES
        for stage, num_steps in STEPS.items()
        for step in range(1, num_steps + 1)
        for micro_batch in ((1,) if site == "weight" else (1, 2, 4))
        for value in (math.nan, math.inf, -math.inf)
        # Before the first step of a stage the optimiser has no state that could be spoilt.
        if not (site == "optimizer" and step == 1) and not (site == "optimizer" and micro_batch < 4)
        # What a stage before the last makes of an infinity that it squashes may be finite again.
        if not (site in ("teacher", "student") and math.isinf(value))
    ]


def test_p14_a_number_that_is_not_finite(workshop, tmp_path):
    every, draw, single = cases(), chooser("P14", 0), ("--set", "compute.micro_batch_sequences=1")
    whole = tmp_path / "whole"
    assert workshop.convert(whole, *single).code == 0
    with Tally("P14", "NaN or infinity in teacher, student, gradient, optimiser or a weight before a save") as tally:
        # At least one of each site.
        chosen = [draw.choice([case for case in every if case[0] == site]) for site in SITES]
        chosen += draw.sample(every, min(trials(0, len(every)), len(every)))
        for number, (site, stage, step, micro_batch, value) in enumerate(chosen):
            run, said = tmp_path / f"poison-{number}", tmp_path / f"poison-{number}.json"
            name = f"{value} in {site} at micro-batch {micro_batch} of step {step} of {stage}, seed {SEED}"
            with tally.trial(name, run):
                ended = workshop.convert(
                    run, *single, fault="poison", site=site, stage=stage, step=step, micro_batch=micro_batch,
                    value=value, say_to=str(said),
                )  # fmt: skip
                assert ended.code == 65, f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                hashes = json.loads(said.read_text())
                if site in ("teacher", "student", "gradient"):
                    assert hashes["before"] == hashes["after"], "the bad step has changed the weights"
                before = FIRST[stage] + step - 1
                assert require_checkpoints(run, at_least=0) == before
                require_finite_checkpoints(run)
                require_honest_log(run, before, site)
                workshop.finish(run, *single, whole=whole)


def require_finite_checkpoints(run: Path) -> None:
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        for file in path.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name} in {file}"


def require_honest_log(run: Path, before: int, site: str) -> None:
    """Fail unless the log shows the bad step as refused; one that was only found at the save is a step taken."""
    lines = atomic.read_lines(run / "metrics.jsonl")
    assert [line["global_step"] for line in lines] == list(range(1, before + 2))
    is_taken = site in ("optimizer", "weight")
    assert [line.get("refused", False) for line in lines] == [False] * before + [not is_taken]


IDLE = {
    "rate": "no weight has changed",
    "skipped": "no weight has changed",
    "forgotten": "has not changed",
    "frozen": "has no gradient",
    "detached": "has no gradient",
    "leaking": "though the stage does not train it",
}


@pytest.mark.parametrize("kind", IDLE)
def test_p15_training_that_does_not_train(workshop, tmp_path, kind):
    run = tmp_path / "idle"
    with Tally("P15", f"training that does not train: {kind}") as tally, tally.trial(kind, run):
        ended = workshop.convert(run, fault="idle", kind=kind)
        assert ended.code == 65, f"ended with {ended.code}: {ended.output}"
        require_one_line(ended)
        assert IDLE[kind] in ended.output


@pytest.mark.full
def test_p16_a_leap_of_the_loss_is_judged_alike_after_a_resume(workshop, tmp_path):
    long = ("--set", "stages.orient.tokens=0", "--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=2048")
    leap = {"stage": "distill", "step": 28, "factor": 3.0}
    whole = tmp_path / "whole"
    ended = workshop.convert(whole, *long, fault="spike", events=[], **leap)
    assert ended.code == 0, ended.output
    expected = figures_of(whole)
    assert [step for step, metrics in expected.items() if "spike" in metrics] == [28]
    assert "standard deviations" in ended.output
    with Tally("P16", "a leap of the loss after a resume") as tally:
        for trial in range(trials(1, 20)):
            run, stop = tmp_path / f"leap-{trial}", 27 - trial
            with tally.trial(f"stopped after step {stop}", run):
                events = [("logging", stop, "SIGTERM")]
                ended = workshop.convert(run, *long, fault="spike", events=events, **leap)
                assert ended.code == 143, ended.output
                assert require_checkpoints(run) == stop
                ended = workshop.convert(run, *long, fault="spike", events=[], **leap)
                assert ended.code == 0, ended.output
                assert figures_of(run) == expected
