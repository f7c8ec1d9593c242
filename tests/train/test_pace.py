"""Conversions without a recipe: for so many tokens, and for a time of which a measured step says how many they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import mohawkify
from mohawkify import Budget, ConvertOptions
from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import UsageError
from mohawkify.planning.automatic import automatic_recipe
from mohawkify.recipe.loading import load_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.train import pace
from tests.commands import make_teacher, run_well
from tests.train.test_convert import stop_at_updates

SMALL = ["evaluation.tokens=200", "compute.device=cpu"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def test_a_teacher_text_and_a_budget_are_enough(teacher: Path, tmp_path: Path) -> None:
    settings = [part for each in SMALL for part in ("--set", each)]
    output = tmp_path / "run"
    done = run_well(
        "convert", teacher, "--data", teacher / "text.txt", "--tokens", "4096", *settings, "--output", output
    )
    assert "  name: automatic" in done.stderr
    assert done.stdout.strip() == str(output)
    recipe = load_recipe(output / "recipe.yaml")
    assert sum(block.tokens for block in recipe.stages.blocks().values()) == 4096
    assert recipe.data.train[0].path == str(teacher / "text.txt")
    assert isinstance(recipe.stages.distill.learning_rate, float), "too short for a range test"
    # What was printed can be kept: the run goes by it.
    again = run_well("convert", teacher, "--recipe", output / "recipe.yaml", "--output", output)
    assert "already finished" in again.stderr


def test_a_time_is_measured_once(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = pace.measured_pace

    def known(source: str, recipe: Recipe, world: object) -> dict[str, float]:
        measured.append(source)
        assert real(source, recipe, world)["distill"] > 0  # type: ignore[arg-type]
        return {"calibrate": 1e-3, "align": 2e-3, "distill": 4e-3}

    monkeypatch.setattr(pace, "measured_pace", known)
    overrides = [f"data.train=[{{path: {teacher / 'text.txt'}}}]", *SMALL]
    lines: list[str] = []
    options = ConvertOptions(output=tmp_path / "run", report=lines.append)
    stop_at_updates(monkeypatch, (2,))
    with pytest.raises(Interrupted):
        mohawkify.convert(teacher, Budget(seconds=40.0), overrides, options)
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    tokens = sum(block.tokens for block in recipe.stages.blocks().values())
    assert 0.8 * 36 < pace._seconds(recipe, {"calibrate": 1e-3, "align": 2e-3, "distill": 4e-3}) <= 36
    mohawkify.convert(teacher, Budget(seconds=40.0), overrides, options)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert len(measured) == 1
    with pytest.raises(UsageError, match="another recipe"):
        mohawkify.convert(teacher, Budget(seconds=80.0), overrides, options)
    with pytest.raises(UsageError, match="another recipe"):
        mohawkify.convert(teacher, Budget(tokens), overrides, options)


def test_a_longer_time_never_buys_fewer_tokens(teacher_configs: Path) -> None:
    source = str(teacher_configs / "SmolLM2-135M.json")
    speed = {"calibrate": 1 / 170, "align": 1 / 150, "distill": 1 / 120}

    def recipe_of(tokens: int) -> Recipe:
        return automatic_recipe(source, Budget(tokens, 1.0), ["compute.device=cpu"], fits=False)

    found = [pace.affordable_tokens(hours * 3600.0, recipe_of, speed) for hours in (0.25, 0.5, 1, 2, 8)]
    assert found == sorted(found)
    assert pace._seconds(recipe_of(found[3]), speed) == pytest.approx(0.9 * 7200, rel=0.05)
    with pytest.raises(UsageError, match="found a time of 1 s, expected at least"):
        pace.affordable_tokens(1.0, recipe_of, speed)
