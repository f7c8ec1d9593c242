"""Conversions in two processes: real commands in processes of their own, which speak over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mohawkify.files.atomic import read_lines
from tests.commands import make_teacher, run_well

RECIPE = """
name: ranks
description: a few steps of every stage
student: {init: attention, state_size: 8}
data:
  train: [{path: "teacher:text.txt"}]
stages:
  orient: {tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill: {tokens: 768, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-4}
compute: {precision: fp32, device: cpu, micro_batch_sequences: 1}
evaluation: {tokens: 400, sequence_length: 32, batch_sequences: 2, every_tokens: 128}
checkpoint: {every_steps: 1, keep: 2}
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # deepspeed imports a compiler that nothing here uses, which takes seconds
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 240.0


class Workshop:
    """A folder with a teacher, a recipe and a run of one process.

    Args:
        folder: the working directory of all commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_teacher(folder / "teacher")
        (folder / "ranks.yaml").write_text(RECIPE)
        run_well(*self.command("single"))
        self.single = curve(folder / "single")

    def command(self, name: str, *more: str) -> list[str]:
        """What stands after `mohawkify`."""
        teacher, recipe, output = (str(self.folder / part) for part in ("teacher", "ranks.yaml", name))
        return ["convert", teacher, "--recipe", recipe, "--output", output, *more]

    def start(self, name: str, *more: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        """Start a conversion; both its outputs are kept."""
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "mohawkify", *self.command(name, *more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip


def curve(run_folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The metrics of every step; of one that was taken again, the last ones."""
    return {(line["stage"], line["step"]): line for line in read_lines(run_folder / "metrics.jsonl") if "loss" in line}


def measured_within(run_folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What was measured within stages, on held-out text."""
    lines = read_lines(run_folder / "metrics.jsonl")
    return {(line["stage"], line["step"]): line["held_out"] for line in lines if "held_out" in line}


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        pytest.fail(f"it hangs: {process.communicate()}")
    return process.returncode, output, errors


def when_logged(process: subprocess.Popen[str], run_folder: Path, lines: int, act: Callable[[], None]) -> None:
    """Act as soon as a run has logged so many steps in all."""
    deadline = time.monotonic() + SECONDS
    while len(curve(run_folder)) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes no steps"
        time.sleep(0.01)
    act()


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a launcher has started, in the order of their ranks."""
    return sorted(psutil.Process(process.pid).children(), key=lambda child: int(child.environ()["RANK"]))


def require_one_line(errors: str, says: str) -> None:
    """Fail unless exactly one line says what went wrong, and nothing else is shown."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert says in lines[0], errors
    assert "Traceback" not in errors


def require_same_curve(run_folder: Path, single: dict[tuple[str, int], dict[str, float]]) -> None:
    """Fail where a run's losses or learning rates leave those of one process."""
    ours = curve(run_folder)
    assert ours.keys() == single.keys()
    for place, line in single.items():
        assert ours[place]["learning_rate"] == line["learning_rate"]
        assert ours[place]["tokens"] == line["tokens"]
        assert ours[place]["loss"] == pytest.approx(line["loss"], rel=1e-5), place
        assert ours[place]["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-4), place
    results, theirs = (read(folder / "results.json") for folder in (run_folder, run_folder.parent / "single"))
    within, expected = measured_within(run_folder), measured_within(run_folder.parent / "single")
    assert within.keys() == expected.keys()
    assert {("orient", 0), ("orient", 2), ("distill", 10)} <= within.keys()
    for place, row in expected.items():
        assert within[place]["kl"] == pytest.approx(row["kl"], rel=1e-5), place
    for name, row in theirs["stages"].items():
        assert results["stages"][name]["kl"] == pytest.approx(row["kl"], rel=1e-5)
        assert results["stages"][name]["top1"] == row["top1"]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def require_finished(workshop: Workshop, name: str, process: subprocess.Popen[str]) -> None:
    """Fail unless a run ends well, with one process speaking, on the curve of a single one."""
    code, output, errors = ended(process)
    assert code == 0, errors
    assert output == f"{workshop.folder / name}\n", "nothing else goes to standard output"
    assert errors.count("training in 2 processes") == 1
    assert "WARNING" not in errors
    require_same_curve(workshop.folder / name, workshop.single)
    assert sorted(path.name for path in (workshop.folder / name).glob("**/.tmp-*")) == []
