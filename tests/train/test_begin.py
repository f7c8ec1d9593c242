"""Training that goes on with the student of a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mohawkify.run.folder import RunFolder
from mohawkify.student.save import load_student
from tests.commands import make_recipe, make_teacher, run, run_well
from tests.exporters.test_llamba import CONFIG, ROWS, make_llamba, weights

SHORT = ("--set", "stages.orient.tokens=0", "--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a recipe, and a run that began as usual."""
    folder = tmp_path_factory.mktemp("begin")
    changes = {"vocab_size": ROWS, "num_hidden_layers": 2, "attention_bias": False, "mlp_bias": False}
    make_teacher(folder / "teacher", tie_word_embeddings=False, intermediate_size=48, rms_norm_eps=1e-5, **changes)
    make_recipe(folder)
    run_well("convert", folder / "teacher", "--recipe", folder / "tiny.yaml", "--output", folder / "first", *SHORT)
    return folder


def convert(place: Path, output: Path, *more: str):
    settings = (each for key in ("student.init=null", *more) for each in ("--set", key))
    arguments = ("--recipe", place / "tiny.yaml", "--output", output, *SHORT, *settings)
    return run("convert", place / "teacher", *arguments)


def test_it_begins_where_the_run_ended(place, tmp_path):
    done = convert(place, tmp_path / "second", f"student.begin={place}/first")
    assert done.exit_code == 0, done.stderr
    first, second = RunFolder(place / "first"), RunFolder(tmp_path / "second")
    assert second.results()["stages"]["init"]["kl"] == pytest.approx(first.results()["student"]["kl"], rel=1e-6)
    assert second.results()["stages"]["distill"]["kl"] != second.results()["stages"]["init"]["kl"]


def test_distilling_goes_on_from_an_imported_checkpoint(place, tmp_path):
    checkpoint = make_llamba(tmp_path / "llamba", weights(torch.float32), tokenizer=False)
    recipe = ("--recipe", place / "tiny.yaml")
    run_well("import", checkpoint, "--output", tmp_path / "run", "--teacher", place / "teacher", *recipe)
    own = ("decay_bias=false", f"state_size={CONFIG['ssm_cfg']['d_state']}")
    keys = [f"student.{each}" for each in (f"begin={tmp_path}/run", *own)]
    done = convert(place, tmp_path / "more", *keys, "stages.distill.learning_rate=1e-6")
    assert done.exit_code == 0, done.stderr
    ids = torch.arange(40).unsqueeze(0)
    students = [load_student(RunFolder(tmp_path / name).final) for name in ("run", "more")]
    with torch.no_grad():
        one, two = (student(ids).logits for student in students)
    assert torch.allclose(one, two, atol=1e-2)
    assert not torch.equal(one, two)  # it was trained, if by next to nothing
    run_well("export", tmp_path / "more", "--target", "llamba")


@pytest.mark.parametrize(
    ("key", "says", "code"),
    [
        ("student.begin=nowhere", "no such run: nowhere", 2),
        ("student.begin=TEACHER", "is not a finished run", 2),
        ("student.begin=FIRST student.state_size=4", "another one than the recipe's: mixer.config differs", 64),
        ("student.begin=FIRST student.init=identity", "expected null", 64),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line(place, tmp_path, key, says, code):
    key = key.replace("FIRST", str(place / "first")).replace("TEACHER", str(place / "teacher"))
    refused = convert(place, tmp_path / "second", *key.split())
    assert (refused.exit_code, says in refused.stderr) == (code, True), refused.stderr
    assert not (tmp_path / "second").exists()
