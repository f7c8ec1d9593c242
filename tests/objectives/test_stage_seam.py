"""A stage is one registered objective and its block in the recipe: a toy from outside works wherever stages do."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import RecipeError
from mohawkify.evaluation.report import console_table
from mohawkify.files.atomic import read_json, read_lines
from mohawkify.objectives.catalogue import make_objective
from mohawkify.objectives.objective import Runner, TeacherStudent
from mohawkify.planning.planning import plan
from mohawkify.recipe import stages
from mohawkify.recipe.loading import apply_overrides, dump_recipe, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.progress import StageProgress
from mohawkify.train.trainer import convert
from tests.commands import RECIPE, make_teacher
from tests.tiny import packed, tiny_pair

TOY = "  toy: {objective: toy, tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}\n"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The toy as an installed package that names its module in the group of entry points."""
    entry = EntryPoint("toy", "tests.objectives.toy_objective", stages.ENTRY_POINTS)
    monkeypatch.setattr(stages, "entry_points", lambda group, name: [entry] if name == "toy" else [])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("toy") / "teacher")


def recipe() -> Recipe:
    lines = RECIPE.splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines) if line.strip().startswith("distill:"))
    return parse_recipe("".join([*lines[:number], TOY, *lines[number:]]), "toy.yaml")


def test_the_order_of_the_stages_is_that_of_the_recipe():
    assert list(recipe().stages.blocks()) == ["orient", "align", "toy", "distill"]
    assert parse_recipe(dump_recipe(recipe()), "again.yaml") == recipe()
    assert apply_overrides(recipe(), ["stages.toy.scale=2.0"]).stages.blocks()["toy"].scale == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.toy.scala=1", "stages.toy.scala: unknown key, did you mean stages.toy.scale?"),
        ("stages.toy.scale=0", r"stages.toy.scale: found 0, expected a number \(above 0\)"),
        ("stages.toy.objective=tye", 'found "tye", expected closed_form, matrix, hidden_state, logits or toy'),
        ("stages.init={objective: toy}", "stages.init: unknown key"),
        ("stages.distil.tokens=5B", "stages.distil: unknown key, did you mean stages.distill"),
    ],
)
def test_errors_come_from_the_block_of_the_objective(override, message):
    with pytest.raises(RecipeError, match=message):
        apply_overrides(recipe(), [override])


def test_a_toy_stage_is_planned_trained_measured_and_continued(teacher, tmp_path, monkeypatch):
    planned = plan(str(teacher), recipe())
    assert planned["stages"]["toy"]["steps"] == 4
    whole = convert(str(teacher), recipe(), ConvertOptions(output=tmp_path / "whole"))
    rows = whole.results()["stages"]
    assert list(rows) == ["init", "orient", "align", "toy", "distill"]
    assert "after toy" in console_table(whole.results())
    assert [line["step"] for line in read_lines(whole.metrics_file) if line["stage"] == "toy"] == [1, 2, 3, 4]
    assert read_json(whole.plan_file)["stages"].keys() == planned["stages"].keys()

    update = StageProgress.update

    def stop_in_toy(self: StageProgress, report) -> None:
        update(self, report)
        if self.name == "toy" and report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StageProgress, "update", stop_in_toy)
        with pytest.raises(Interrupted, match="after step 2 of stage toy"):
            convert(str(teacher), recipe(), ConvertOptions(output=tmp_path / "run"))
    run = convert(str(teacher), recipe(), ConvertOptions(output=tmp_path / "run"))
    ours, theirs = (load_file(each.final / "model.safetensors") for each in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_declared_parameters_get_gradients_and_the_loss_is_zero_on_the_teachers_own(tmp_path):
    models = tiny_pair("llama", tmp_path)
    block = recipe().stages.blocks()["toy"]
    objective = make_objective(models, block)
    declared = objective.parameters()
    for name, parameter in models.student.named_parameters():
        parameter.requires_grad_(name in declared)
    assert objective.run(packed(), Runner(lambda loss: loss.backward()))["loss"] > 0
    moved = {name for name, p in models.student.named_parameters() if p.grad is not None}
    assert moved == set(declared)
    same = TeacherStudent(models.teacher, models.teacher.requires_grad_(True), replace(models.spec), models.adapter)
    assert make_objective(same, block).run(packed(), Runner(lambda loss: None))["loss"] == 0
