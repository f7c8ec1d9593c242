"""A conversion on another device than the CPU: nothing is mixed up, and the numbers are the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mohawkify.data.teacher_logits import TeacherLogits
from mohawkify.files.atomic import read_json, read_lines
from mohawkify.run.folder import RunFolder
from tests.commands import make_recipe, make_teacher, run_well
from tests.pretend import END, NEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a teacher, a recipe and a run on the CPU."""
    folder: Path = tmp_path_factory.mktemp("device")
    make_teacher(folder / "teacher")
    make_recipe(folder)
    run_well(*command(folder, "cpu"))
    return folder


def command(folder: Path, output: str) -> list[str]:
    given = [
        "convert",
        str(folder / "teacher"),
        "--recipe",
        str(folder / "tiny.yaml"),
        "--output",
        str(folder / output),
    ]
    # Adam's first steps are as large for a gradient that is only rounding: at a small rate that stays rounding.
    return [*given, "--set", "stages.distill.learning_rate=1e-5"]


def run_on_device(*commands: list[str]) -> list[str]:
    """Run commands on the pretended device, in one process of their own, and return what each prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [argument for command in commands for argument in (NEXT, *command, "--debug")][1:]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretend", *arguments],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.split(END)[:-1]


def test_a_conversion_on_a_device_is_that_of_the_cpu(folder):
    """Its losses to rounding, which is another: attention is composed of other operators there."""
    run = folder / "device"
    prompt = ["hello", "--max-tokens", "5", "--teacher"]
    _, evaluated, generated = run_on_device(
        command(folder, "device"), ["eval", str(run), "--json"], ["generate", str(run), *prompt]
    )
    ours, theirs = (load_file(folder / name / "final" / "model.safetensors") for name in ("device", "cpu"))
    assert ours.keys() == theirs.keys()
    ours, theirs = (list(read_lines(RunFolder(folder / name).metrics_file)) for name in ("device", "cpu"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    ours, theirs = (read_json(folder / name / "results.json")["stages"] for name in ("device", "cpu"))
    for stage, row in theirs.items():
        assert ours[stage]["kl"] == pytest.approx(row["kl"], rel=1e-4)

    assert json.loads(evaluated)["student"]["kl"] == pytest.approx(theirs["distill"]["kl"], rel=1e-4)
    assert generated == run_well("generate", folder / "cpu", *prompt).stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ("--set", "student.init=identity", "--set", "student.keep.layers=[1]"),
        ("--set", "compute.activation_checkpointing=true", "--set", "compute.micro_batch_sequences=2"),
        (
            "--set",
            "data.final_phase=[{path: 'teacher:text.txt'}]",
            "--set",
            "stages.distill.final_phase={tokens: 64, sequence_length: 16, teacher: TEACHER}",
        ),
    ],
)
def test_other_ways_to_convert_run_on_a_device(folder, tmp_path, options):
    given = [option.replace("TEACHER", str(folder / "teacher")) for option in options]
    run_on_device([*command(folder, str(tmp_path / "run")), *given])


@pytest.mark.full
def test_a_teacher_is_asked_on_a_device(folder, tmp_path):
    asked = ["cache-logits", str(folder / "teacher"), "--recipe", str(folder / "tiny.yaml"), "--stage-phase", "train"]
    run_on_device([*asked, "--top-k", "8", "--output", str(tmp_path / "device")])
    run_well(*asked, "--top-k", "8", "--output", tmp_path / "cpu")
    ours, theirs = (TeacherLogits(tmp_path / name) for name in ("device", "cpu"))
    for mine, other in zip(ours.read(theirs.sequences), theirs.read(theirs.sequences), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)  # they are kept in 16 bits
