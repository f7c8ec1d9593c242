"""Conversions in two processes through the command line: the curve of one process under every engine."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from mohawkify.files.atomic import read_lines
from mohawkify.run import checkpoint
from mohawkify.train.progress import StageProgress
from tests.commands import run
from tests.distributed.rank_runs import (
    TORCHRUN,
    Workshop,
    ended,
    ranks,
    require_finished,
    require_one_line,
    when_logged,
)

# A checkpoint at the borders of the stages alone; those after every step are what the interrupted run is for.
FEW_CHECKPOINTS = ("--set", "checkpoint.every_steps=100")
# What every process runs first, the launcher too: nothing that lies in a store is unpickled.
REFUSE_PICKLES = """
import sys
def refuse(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError("a pickle is read")
sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ranks"))


def test_zero_0_under_torchrun(workshop):
    options = ("--engine", "deepspeed", "--zero", "0", *FEW_CHECKPOINTS)
    require_finished(workshop, "zero-0", workshop.start("zero-0", *options, launcher=TORCHRUN))


@pytest.mark.full
@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_every_other_zero_by_processes_of_its_own(workshop, zero):
    options = ("--processes", "2", "--engine", "deepspeed", "--zero", zero, *FEW_CHECKPOINTS)
    require_finished(workshop, f"zero-{zero}", workshop.start(f"zero-{zero}", *options))


@pytest.mark.full
def test_fsdp_with_a_teacher_that_is_spread_too_and_without_a_pickle(workshop):
    site = workshop.folder / "careful"
    site.mkdir()
    (site / "sitecustomize.py").write_text(REFUSE_PICKLES)
    options = ("--processes", "2", "--engine", "fsdp", "--set", "compute.shard_teacher=true", *FEW_CHECKPOINTS)
    require_finished(workshop, "fsdp", workshop.start("fsdp", *options, PYTHONPATH=str(site)))


@pytest.mark.full
def test_a_run_goes_on_in_one_process_and_in_two_again_under_another_zero(workshop, monkeypatch):
    """A signal to one of two under ZeRO-2, a step without an engine, the rest under ZeRO-3: the curve of one process.

    That every ZeRO goes on from a checkpoint of its own is tested in tests/train/engines.
    """
    folder = workshop.folder / "chain"
    process = workshop.start("chain", "--processes", "2", "--engine", "deepspeed", "--zero", "2")
    when_logged(process, folder, 3, lambda: ranks(process)[1].send_signal(signal.SIGTERM))
    code, output, errors = ended(process)
    assert code == 143, errors
    assert output == ""
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
    assert read_lines(folder / "metrics.jsonl")[-1]["global_step"] == last + 1

    require_finished(workshop, "chain", workshop.start("chain", "--processes", "2", "--zero", "3"))
