"""Learning rates that are found when a stage begins: recorded, deterministic, and without a trace in the student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mohawkify
from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import CheckpointError, UsageError
from mohawkify.files.atomic import read_json
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.run.folder import RunFolder
from mohawkify.train import tuning
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert
from tests.commands import RECIPE, make_teacher, run_well
from tests.train.test_convert import stop_at_updates

AUTO = ["stages.orient.tokens=0", "stages.align.learning_rate=auto", "stages.distill.learning_rate=auto"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), AUTO)


@pytest.fixture(scope="module")
def whole(teacher: str, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return convert(teacher, recipe, ConvertOptions(output=tmp_path_factory.mktemp("run") / "whole"))


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.final / "model.safetensors")


def same(left: RunFolder, right: RunFolder) -> bool:
    ours, theirs = weights(left), weights(right)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_records_what_it_found_and_draws_it(whole: RunFolder) -> None:
    found = read_json(whole.tuning_file)
    assert list(found) == ["align", "distill"]
    for stage, test in found.items():
        rates = [row["learning_rate"] for row in test["rates"]]
        assert rates == sorted(set(rates))
        assert all(row["refused"] == (not (row["loss"] or 1e99) < test["start_loss"]) for row in test["rates"])
        assert test["learning_rate"] > 0
        assert (whole.path / f"tuning-{stage}.svg").read_text().startswith("<svg")
    assert found["distill"]["after_steps"] == 2


def test_the_student_trains_as_if_the_recipe_had_named_the_rates(
    teacher: str, recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    """Neither the weights, nor an optimizer's moments, nor the random generators are other than before."""
    found = read_json(whole.tuning_file)
    named = apply_overrides(recipe, [f"stages.{n}.learning_rate={t['learning_rate']}" for n, t in found.items()])
    assert same(convert(teacher, named, ConvertOptions(output=tmp_path / "named")), whole)


@pytest.mark.parametrize("stops", [(1,), (2,), (3,)], ids=str)
def test_a_stopped_run_does_not_look_again(
    teacher: str,
    recipe: Recipe,
    whole: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
) -> None:
    stop_at_updates(monkeypatch, stops)
    options = ConvertOptions(output=tmp_path / "run")
    with pytest.raises(Interrupted):
        convert(teacher, recipe, options)
    looked: list[str] = []
    test = tuning.RangeTest.run
    monkeypatch.setattr(tuning.RangeTest, "run", lambda self: (looked.append(self.stage.name), test(self))[1])
    assert same(convert(teacher, recipe, options), whole)
    assert looked == ["distill"] if stops[0] <= 2 else not looked


def test_a_stage_under_way_needs_its_record(
    teacher: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_updates(monkeypatch, (1,))
    options = ConvertOptions(output=tmp_path / "run")
    with pytest.raises(Interrupted):
        convert(teacher, recipe, options)
    file = RunFolder(tmp_path / "run").tuning_file
    for damaged in ('{"align": {"learning_rate": "high"}}', "[]", "{"):
        file.write_text(damaged)
        with pytest.raises(CheckpointError):
            convert(teacher, recipe, options)
    file.unlink()
    with pytest.raises(CheckpointError, match="lacks the learning rate of stage align, which is under way"):
        convert(teacher, recipe, options)


def test_tune_prints_a_table_and_convert_goes_on_from_it(teacher: str, tmp_path: Path) -> None:
    """A calibrated student, as `convert` has it without a word about the start."""
    file = tmp_path / "mine.yaml"
    text = RECIPE.replace("init: attention, ", "").replace("orient: {tokens: 128", "orient: {tokens: 0")
    file.write_text(text.replace("learning_rate: 1e-3", "learning_rate: auto"))
    arguments = (teacher, "--recipe", file, "--set", "stages.calibrate.tokens=256", "--set", "data.epochs=null")
    shown = run_well("tune", *arguments, "--output", tmp_path / "run").stdout
    assert "stages.align.learning_rate=" in shown
    assert "stages.distill.learning_rate=" in shown
    before = read_json(tmp_path / "run" / "tuning.json")
    again = json.loads(run_well("tune", *arguments, "--output", tmp_path / "run", "--json").stdout)
    assert again == before
    run_well("convert", *arguments, "--output", tmp_path / "run")
    after = read_json(tmp_path / "run" / "tuning.json")
    # The first stage that trains takes what was found; behind it the student is another.
    assert after["align"] == before["align"]
    assert after["distill"]["after_steps"] > before["distill"]["after_steps"]
    with pytest.raises(UsageError, match="is already finished"):
        mohawkify.tune(teacher, str(file), arguments[4::2], ConvertOptions(output=tmp_path / "run"))
