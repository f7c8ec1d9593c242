"""A conversion at its edges: nothing valid to continue from, a bad step, a signal before the first step, slow disks."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mohawkify.files import manifest
from mohawkify.files.atomic import read_json, read_lines, write_json
from mohawkify.run import checkpoint
from mohawkify.train import loop
from mohawkify.train.engines.engine import LocalEngine
from mohawkify.train.progress import StageProgress
from mohawkify.train.saving import CheckpointWriter
from mohawkify.train.watchdog import Watchdog
from tests.commands import make_recipe, make_teacher, run

ORIENT_ALONE = ("--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher and a recipe of 2, 2 and 3 steps."""
    folder = tmp_path_factory.mktemp("conversion")
    make_teacher(folder / "teacher")
    make_recipe(folder)
    return folder


def convert(folder: Path, output: Path, *more: str) -> Result:
    options = ("--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep=3")
    return run("convert", folder / "teacher", "--recipe", folder / "tiny.yaml", "--output", output, *options, *more)


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory) -> Path:
    """A run that was stopped in stage 3, after step 5; its metrics are not what was measured."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    update = StageProgress.update

    def stop_in_distill(self: StageProgress, report: Any) -> None:
        update(self, report)
        if self.name == "distill":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageProgress, "update", stop_in_distill)
        assert convert(folder, output).exit_code == 143
    results = read_json(output / "results.json")
    for row in results["stages"].values():
        row["kl"] = 99.0
    write_json(output / "results.json", results)
    return output


def damage(output: Path, *steps: int) -> None:
    for step in steps:
        (output / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")


def measured_again(output: Path) -> list[str]:
    return [name for name, row in read_json(output / "results.json")["stages"].items() if row["kl"] != 99.0]


def test_figures_of_a_stage_whose_checkpoints_are_lost_are_measured_again(folder, stopped, tmp_path):
    output = shutil.copytree(stopped, tmp_path / "run")
    damage(output, 4, 5)
    result = convert(folder, output)
    assert result.exit_code == 0, result.stderr
    assert "the checkpoints that align was measured at are lost: it will be measured again" in result.stderr
    assert measured_again(output) == ["align", "distill"]


def test_a_run_without_a_valid_checkpoint_says_that_it_begins_again(folder, stopped, tmp_path):
    output = shutil.copytree(stopped, tmp_path / "run")
    damage(output, 2, 3, 4, 5)  # step 2 is that of the best stage
    result = convert(folder, output)
    assert result.exit_code == 0, result.stderr
    assert "none of 4 checkpoints is valid: beginning again" in result.stderr
    assert measured_again(output) == ["orient", "align", "distill"]


def test_hashing_checkpoints_counts_as_progress(folder, tmp_path, monkeypatch):
    """However long it takes: with many large checkpoints to keep, every save would end the run otherwise."""
    watched: list[bool] = []
    write, sha256_of = CheckpointWriter._write, manifest.sha256_of

    def hash_watched(path: Path, heartbeat: Any = manifest.no_heartbeat) -> str:
        watched.append(isinstance(getattr(heartbeat, "__self__", None), Watchdog))
        return sha256_of(path, heartbeat)

    def write_watched(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "sha256_of", hash_watched)
            write(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", write_watched)
    keep_one = ("--set", "checkpoint.keep=1")
    result = convert(folder, tmp_path / "run", *ORIENT_ALONE, *keep_one)
    assert result.exit_code == 0, result.stderr
    assert len(watched) == 3 * 4, "the files of each of two checkpoints when they are written, and of one that is kept"
    assert all(watched)


@pytest.mark.parametrize("bad", ["loss", "gradient_norm"])
def test_a_step_that_is_refused_is_logged(folder, tmp_path, monkeypatch, bad):
    passes = loop.forward_backward
    with monkeypatch.context() as patch:
        if bad == "loss":
            patch.setattr(loop, "forward_backward", lambda *arguments: {**passes(*arguments), "loss": math.nan})
        else:
            patch.setattr(LocalEngine, "step", lambda self, rate: math.inf)
        result = convert(folder, tmp_path / "run", *ORIENT_ALONE)
    assert result.exit_code == 65, result.stderr
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["refused"] is True
    assert (line["stage"], line["step"], line["global_step"]) == ("orient", 1, 1)
    assert not math.isfinite(float(line[bad]))
    assert line["learning_rate"] > 0
    assert line["text"] == "train"
    assert len(set(line["sequences"])) == 4
    assert convert(folder, tmp_path / "run", *ORIENT_ALONE).exit_code == 0
    last = {line["step"]: line for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert [("refused" in line) for line in last.values()] == [False, False]


def test_a_signal_before_the_first_step_ends_at_once(folder, stopped, tmp_path, monkeypatch):
    output = shutil.copytree(stopped, tmp_path / "run")
    load = checkpoint.load_tensors

    def load_and_stop(saved: checkpoint.Checkpoint, group: Any) -> Any:
        if group == "optimizer":
            os.kill(os.getpid(), signal.SIGTERM)
        return load(saved, group)

    monkeypatch.setattr(checkpoint, "load_tensors", load_and_stop)
    result = convert(folder, output)
    assert result.exit_code == 143
    assert "stopped outside of training; nothing is half-written" in result.stderr
