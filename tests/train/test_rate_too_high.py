"""A learning rate 30 times too high is noticed, said, and costs the run nothing: the better student is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mohawkify.files.atomic import read_json
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.student.save import load_student
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert

CASES = {
    "distill": ["stages.align.tokens=0", "stages.distill.tokens=5120"],
    "distill, another seed": ["stages.align.tokens=0", "stages.distill.tokens=5120", "seed=1"],
    "align": ["stages.align.tokens=5120", "stages.distill.tokens=0"],
}
COMMON = [
    *("student.init=calibrated", "student.write=decay", "stages.orient.tokens=0", "evaluation.tokens=1024"),
    "stages.calibrate={tokens: 4k, sequence_length: 64, batch_sequences: 4}",
    *(f"stages.{stage}.{key}" for stage in ("align", "distill") for key in ("sequence_length=64", "batch_sequences=4")),
]


@pytest.mark.parametrize("case", ["distill", *(pytest.param(each, marks=pytest.mark.full) for each in list(CASES)[1:])])
def test_a_rate_thirty_times_too_high_is_noticed(stories_teacher: Path, tmp_path: Path, case: str) -> None:
    stage = case.split(",")[0]
    recipe = apply_overrides(load_recipe("stories"), [*COMMON, *CASES[case]])
    auto = apply_overrides(recipe, [f"stages.{stage}.learning_rate=auto"])
    good = convert(str(stories_teacher), auto, ConvertOptions(output=tmp_path / "good"))
    rate = read_json(good.tuning_file)[stage]["learning_rate"]
    stages = good.results()["stages"]
    assert stages[stage]["kl"] < stages["calibrate"]["kl"]

    lines: list[str] = []
    high = apply_overrides(recipe, [f"stages.{stage}.learning_rate={30 * rate}"])
    run = convert(str(stories_teacher), high, ConvertOptions(output=tmp_path / "high", report=lines.append))
    said = "\n".join(lines)
    assert f"in the first tenth of stage {stage} the loss rose to" in said
    assert f"stages.{stage}.learning_rate is probably too high" in said
    assert f"stage {stage} made the student worse" in said
    assert "the final student is the one after stage calibrate" in said
    results = run.results()
    assert results["student"]["kl"] == results["stages"]["calibrate"]["kl"] < results["stages"][stage]["kl"]
    assert load_student(run.final) is not None
