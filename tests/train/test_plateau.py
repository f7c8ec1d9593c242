"""Phases that end early: a pure function of the losses, the planned end always taken, the same after a stop."""

from __future__ import annotations

import os
import signal

import pytest

from mohawkify.distributed.shutdown import Interrupted
from mohawkify.files.atomic import read_lines
from mohawkify.planning.planning import plan
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import DistillRecipe, ScheduleRecipe
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.plateau import Phases, PlateauDetector
from mohawkify.train.progress import StageProgress
from mohawkify.train.schedule import learning_rate
from mohawkify.train.trainer import convert
from tests.commands import make_teacher
from tests.data.test_teacher_logits import RECIPE


def phases_of(decay: float, final_phase: int | None, window: int = 20, threshold: float = 0.1) -> Phases:
    """100 steps of 10 tokens, the last of them on other text, warm-up in the first 10."""
    stage = DistillRecipe.model_validate(
        {
            "tokens": 1000,
            "sequence_length": 5,
            "batch_sequences": 2,
            "learning_rate": 1.0,
            "final_phase": None if final_phase is None else {"tokens": final_phase, "sequence_length": 5},
            "plateau": {"window": window, "threshold": threshold},
        }
    )
    return Phases(stage, ScheduleRecipe(warmup=0.1, decay=decay))


def walk(phases: Phases, loss: float = 1.0) -> tuple[list[int], dict[str, int]]:
    """The planned steps that are taken where every loss is the same, and what is left out."""
    watch, step, taken, skipped = PlateauDetector(), 0, [], {}
    while step < phases.num_steps:
        taken.append(step)
        step += 1
        skip = phases.skip_to(step, {"loss": loss}, watch)
        if skip is not None:
            data = phases.segment_at(step).data
            skipped[data] = skipped.get(data, 0) + skip[0] - step
            step = skip[0]
    return taken, skipped


def test_windows_are_compared_with_the_one_before():
    watch = PlateauDetector()
    found = [watch.add(loss, 2, 0.1) for loss in (4.0, 4.0, 3.0, 3.0, 2.9, 2.9, 2.8, 2.8)]
    assert found[:5] == [None] * 5
    assert found[5] == pytest.approx(0.1 / 3.0)
    assert found[7] == pytest.approx(0.1 / 2.9)
    assert PlateauDetector(0, 0.0, -1.0).add(-2.0, 1, 0.1) == 0.0


@pytest.mark.parametrize(
    ("decay", "final_phase", "taken", "skipped"),
    [
        (0.1, None, [*range(14), *range(90, 100)], {"train": 76}),
        (0.0, None, [*range(14)], {"train": 86}),
        (0.1, 300, [*range(14), *range(70, 74), *range(90, 100)], {"train": 56, "final_phase": 16}),
        (0.5, 300, [*range(14), *range(50, 100)], {"train": 36}),
    ],
)
def test_warm_up_decay_and_the_start_of_the_finish_are_always_taken(decay, final_phase, taken, skipped):
    phases = phases_of(decay, final_phase)
    assert walk(phases) == (taken, skipped)
    rates = [learning_rate(step, 100, 1.0, ScheduleRecipe(warmup=0.1, decay=decay)) for step in taken]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    if decay:
        assert rates[-1] == pytest.approx(1 / (100 * decay + 1), rel=1e-3)
    outcome = phases.outcome(skipped)
    assert sum(row["steps"] for row in outcome) == len(taken)
    assert {row["data"] for row in outcome if row["ended_by"] == "plateau"} == skipped.keys()
    assert phases.tokens_between(0, 100) == 1000


def test_a_loss_that_falls_is_left_alone():
    phases, watch = phases_of(0.1, 300), PlateauDetector()
    assert all(phases.skip_to(step, {"loss": 0.9**step}, watch) is None for step in range(1, 101))


def test_steps_without_a_loss_are_left_out():
    phases, watch = phases_of(0.1, None), PlateauDetector()
    assert all(phases.skip_to(step, {}, watch) is None for step in range(1, 101))
    assert watch == PlateauDetector()


def test_the_divergence_is_watched_where_there_is_one():
    phases, watch = phases_of(0.1, None), PlateauDetector()
    steps = range(1, 101)
    assert all(phases.skip_to(step, {"loss": 5.0, "kl": 0.9**step}, watch) is None for step in steps)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("plateau") / "teacher")


SETTINGS = [
    "stages.distill.tokens=2k",
    "stages.distill.final_phase.tokens=400",
    "stages.distill.final_phase.sequence_length=16",
    "stages.distill.learning_rate=1e-9",
    "schedule.floor=1e-9",
    "stages.distill.plateau={window: 128, threshold: 0.3}",
    "schedule.decay=0.1",
    "data.epochs=null",
]


def test_a_run_saturates_says_so_and_does_so_again_after_a_stop(teacher, tmp_path, monkeypatch):
    recipe = apply_overrides(parse_recipe(RECIPE, "r"), SETTINGS)
    lines: list[str] = []
    whole = convert(str(teacher), recipe, ConvertOptions(output=tmp_path / "whole", report=lines.append))
    steps = [line["step"] for line in read_lines(whole.metrics_file)]
    # 25 steps on train, 6 on final_phase, decay from 28: the first window ends at step 5, the second at step 7.
    assert steps == [*range(1, 8), *range(26, 32)]
    row = whole.results()["stages"]["distill"]
    assert row["phases"][0] == {"data": "train", "steps": 7, "tokens": 448, "ended_by": "plateau"}
    assert row["phases"][1]["ended_by"] == "budget"
    assert row["tokens"] == sum(phase["tokens"] for phase in row["phases"])
    assert any("is on a plateau on train text at step 7" in line for line in lines)
    assert any("448 tokens of train text, ended by plateau" in line for line in lines)
    assert "ended by" in (whole.path / "report.md").read_text()

    update, stops = StageProgress.update, [6, 7]

    def update_and_stop(self, report):
        update(self, report)
        if stops and report.step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "update", update_and_stop)
    for _ in range(2):
        with pytest.raises(Interrupted):
            convert(str(teacher), recipe, ConvertOptions(output=tmp_path / "run", report=lines.append))
    run = convert(str(teacher), recipe, ConvertOptions(output=tmp_path / "run", report=lines.append))
    ours, theirs = (
        [(line["step"], line["loss"], line["learning_rate"]) for line in read_lines(each.metrics_file)]
        for each in (run, whole)
    )
    assert ours == theirs
    assert run.results()["stages"]["distill"]["phases"] == row["phases"]


def test_the_plan_says_at_most(teacher):
    recipe = apply_overrides(parse_recipe(RECIPE, "r"), SETTINGS)
    assert any("at most" in line for line in plan(str(teacher), recipe)["warnings"])
