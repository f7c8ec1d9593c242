"""The command score, and conversions that keep what it chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mohawkify.recipe.loading import load_recipe
from tests.commands import make_recipe, make_teacher, run, run_well


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a recipe with a calibration."""
    folder = tmp_path_factory.mktemp("score")
    make_teacher(folder / "teacher")
    recipe = make_recipe(folder)
    stages = "stages:\n  calibrate: {tokens: 256, sequence_length: 16, batch_sequences: 4}\n"
    recipe.write_text(recipe.read_text().replace("init: attention", "init: calibrated").replace("stages:\n", stages))
    return folder


def convert(folder: Path, keep: str, name: str) -> dict:
    run_well(
        "convert", folder / "teacher", "--recipe", folder / "tiny.yaml", "--set", f"student.keep={keep}",
        "--output", folder / name,
    )  # fmt: skip
    return json.loads((folder / name / "student.json").read_text())


def test_a_conversion_keeps_what_the_scores_chose(folder: Path) -> None:
    asked = ("score", folder / "teacher", "--recipe", folder / "tiny.yaml", "--output", folder / "scores")
    asked = (*asked, "--layers", 1, "--heads", "20%")
    found = json.loads(run_well(*asked, "--json").stdout)
    assert {"scores.json", "scores.md", "scores.svg"} <= {file.name for file in (folder / "scores").iterdir()}
    assert "| 1 layers best" in (folder / "scores" / "scores.md").read_text()
    again = run_well(*asked)
    assert "KL" not in again.stderr
    assert "| 2 heads best" in again.stdout
    keep = f"{{layers: auto, number: 1, scores: {folder / 'scores' / 'scores.json'}}}"
    student = convert(folder, keep, "layers")
    assert [layer["mixer_heads"] for layer in student["layer_specs"]].index(0) == found["layers"]["best"][0]


def test_a_conversion_without_scores_makes_them(folder: Path) -> None:
    student = convert(folder, "{heads: 10%}", "run")
    scores = json.loads((folder / "run-scores" / "scores.json").read_text())
    layer, head = scores["heads"]["best"][0]
    assert student["layer_specs"][layer]["heads"] == [head]
    assert load_recipe(folder / "run" / "recipe.yaml").student.keep.heads == ((layer, head),)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("{layers: auto}", 'found "auto" with neither number nor share, expected one of both beside auto only'),
        ("{layers: [1], number: 1}", "found [1] with number, expected one of both beside auto only"),
        ("{heads: 0%}", 'found "0%", expected a list of pairs of a layer and a head, each once, or a share such as 2%'),
        ("{scores: x.json}", "found scores, expected layers: auto or a share of heads that they choose"),
        ("{heads: 5%, scores: x.json}", "x.json holds no finished scores"),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(folder: Path, keep: str, message: str) -> None:
    refused = run(
        "convert", folder / "teacher", "--recipe", folder / "tiny.yaml", "--set", f"student.keep={keep}",
        "--output", folder / "never",
    )  # fmt: skip
    assert refused.exit_code == 64
    assert message in refused.stderr
    assert not (folder / "never").exists()
