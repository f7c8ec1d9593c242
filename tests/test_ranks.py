"""Conversions in two processes through the command line: the numbers of one process, and how they end when one fails.

Every command is a real one in processes of its own; they speak over gloo.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mohawkify import checkpoint
from mohawkify.storage import read_lines
from mohawkify.train.progress import StageProgress
from tests.commands import make_teacher, run, run_well

RECIPE = """
name: ranks
description: a few steps of every stage
student: {state_width: 8}
data:
  train: [{path: "teacher:text.txt"}]
stages:
  orient: {tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 256, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill: {tokens: 768, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-4}
compute: {precision: fp32, device: cpu, micro_batch_sequences: 1}
evaluation: {tokens: 400, sequence_length: 32, batch_sequences: 2}
checkpoint: {every_steps: 1, keep: 2}
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # deepspeed imports a compiler that nothing here uses, which takes seconds
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 240.0
# What a process with the number 1 runs first: its text becomes unreadable at its fifth batch.
BREAK_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import itertools
    from mohawkify.data import packing
    from mohawkify.errors import DataError
    calls, packed_batch = itertools.count(1), packing.packed_batch
    def broken(*arguments):
        if next(calls) == 5:
            raise DataError("the disk of this machine has lost the text")
        return packed_batch(*arguments)
    packing.packed_batch = broken
"""
# What every process runs first, the launcher too: nothing that lies in a store is unpickled.
REFUSE_PICKLES = """
import sys
def refuse(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError("a pickle is read")
sys.addaudithook(refuse)
"""


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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ranks"))


def curve(run_folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The figures of every step; of one that was taken again, the last ones."""
    return {(line["stage"], line["step"]): line for line in read_lines(run_folder / "metrics.jsonl")}


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
    while len(read_lines(run_folder / "metrics.jsonl")) < lines:
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


def test_zero_0_under_torchrun(workshop):
    require_finished(
        workshop, "zero-0", workshop.start("zero-0", "--engine", "deepspeed", "--zero", "0", launcher=TORCHRUN)
    )


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_every_other_zero_by_processes_of_its_own(workshop, zero):
    process = workshop.start(f"zero-{zero}", "--processes", "2", "--engine", "deepspeed", "--zero", zero)
    require_finished(workshop, f"zero-{zero}", process)


def test_fsdp_with_a_teacher_that_is_spread_too_and_without_a_pickle(workshop):
    site = workshop.folder / "careful"
    site.mkdir()
    (site / "sitecustomize.py").write_text(REFUSE_PICKLES)
    options = ("--processes", "2", "--engine", "fsdp", "--set", "compute.shard_teacher=true")
    require_finished(workshop, "fsdp", workshop.start("fsdp", *options, PYTHONPATH=str(site)))


def test_a_run_under_every_zero_survives_an_error_a_request_to_stop_and_a_kill(workshop, monkeypatch):
    """One run under ZeRO-1, ZeRO-2, no engine and ZeRO-3, each ended in another way, comes to the curve of one process.

    That every ZeRO goes on from a checkpoint of its own is tested in tests/engines.
    """
    folder = workshop.folder / "chain"
    (workshop.folder / "site").mkdir()
    (workshop.folder / "site" / "sitecustomize.py").write_text(BREAK_RANK_1)
    options = ("--processes", "2", "--engine", "deepspeed", "--zero", "1", "--set", "compute.data_workers=0")
    code, output, errors = ended(workshop.start("chain", *options, PYTHONPATH=str(workshop.folder / "site")))
    assert code == 66, errors
    assert output == ""
    require_one_line(errors, "the disk of this machine has lost the text")
    assert checkpoint.newest_valid(folder / "checkpoints", pytest.fail).global_step == 4

    process = workshop.start("chain", "--processes", "2", "--zero", "2")
    when_logged(process, folder, 7, lambda: process.send_signal(signal.SIGTERM))
    code, _, errors = ended(process)
    assert code == 143, errors
    require_one_line(errors, "is saved")
    last = read_lines(folder / "metrics.jsonl")[-1]["global_step"]
    found = checkpoint.newest_valid(folder / "checkpoints", pytest.fail)
    assert found.global_step == last, "a request to stop costs no step"
    assert {"cpu", "rank-1.cpu"} == checkpoint.load_tensors(found, "rng").keys()

    update = StageProgress.update

    def stop_at_once(self: StageProgress, report: Any) -> None:
        update(self, report)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "update", stop_at_once)
    assert run(*workshop.command("chain")).exit_code == 143
    monkeypatch.setattr(StageProgress, "update", update)
    last = read_lines(folder / "metrics.jsonl")[-1]["global_step"]
    assert last == found.global_step + 1

    process = workshop.start("chain", "--processes", "2", "--zero", "3")
    when_logged(process, folder, last + 2, lambda: ranks(process)[1].kill())
    code, _, errors = ended(process)
    assert code == 75, errors
    require_one_line(errors, "process")
    found = checkpoint.newest_valid(folder / "checkpoints", pytest.fail)
    assert found.global_step >= last + 1
    require_finished(workshop, "chain", workshop.start("chain", "--processes", "2", "--zero", "3"))
