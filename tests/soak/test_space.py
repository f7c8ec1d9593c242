"""Where the disk is full, one line says so, nothing is lost, and the run goes on once there is space."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.soak import IS_SOAK, SEED, chooser, trials
from tests.soak.runs import (
    KILLED,
    Tally,
    compare_runs,
    copy_run,
    figures_of,
    require_checkpoints,
    require_one_line,
)
from tests.soak.server import Ended

ERRORS = ("ENOSPC", "EDQUOT", "EIO")
# What is flushed or removed needs no room of its own.
SPACE = re.compile(r"[\d,]+ bytes are needed, [\d,]+ are free|cannot (flush|remove) .*; [\d,]+ bytes are free")


def require_space_told(ended: Ended, error: str, place: Path) -> None:
    """Fail unless a command ended with exit code 74 and one line: the place and, of a full disk, the bytes."""
    assert ended.code == 74, f"{ended.code}: {ended.output}"
    require_one_line(ended)
    assert str(place) in ended.output
    assert error == "EIO" or SPACE.search(ended.output), ended.output


def test_p6_an_error_at_every_operation_of_a_save(workshop, tmp_path):
    """The error comes at one operation of the fifth save, before which four checkpoints were written."""
    count_to = tmp_path / "count.json"
    ended = workshop.convert(
        tmp_path / "count", fault="disk", window="save", call=5, index=-1, action="EIO", count_to=str(count_to)
    )
    assert ended.code == 0, ended.output
    names = json.loads(count_to.read_text())
    cases = [(index, error) for error in ERRORS for index in range(len(names))]
    draw = chooser("P6", 0)
    with Tally("P6", "ENOSPC, EDQUOT or EIO at an operation of a save") as tally:
        for index, error in draw.sample(cases, min(trials(4, len(cases)), len(cases))):
            run = tmp_path / f"{error}-{index}"
            with tally.trial(f"{error} at operation {index} ({names[index]}), seed {SEED}", run):
                ended = workshop.convert(run, fault="disk", window="save", call=5, index=index, action=error)
                require_space_told(ended, error, run)
                require_checkpoints(run, at_least=4)
                workshop.finish(run)


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory) -> Path:
    """A run that was killed when only its report and the student were left to write."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ended = workshop.convert(run, fault="at", events=[("final_teacher", 1, "SIGKILL")])
    assert ended.code == KILLED, ended.output
    return run


@pytest.mark.full
def test_p6_an_error_at_every_operation_of_the_end(workshop, trained, tmp_path):
    """The error comes while the report and the finished student are written."""
    count, count_to = copy_run(trained, tmp_path / "count"), tmp_path / "count.json"
    ended = workshop.convert(
        count, fault="disk", window="final_phase", call=1, index=-1, action="EIO", count_to=str(count_to)
    )
    assert ended.code == 0, ended.output
    names = json.loads(count_to.read_text())
    cases = [(index, error) for error in ERRORS for index in range(len(names))]
    # Safetensors tells its errors in words.
    always = [(names.index("save_file"), "ENOSPC")]
    draw = chooser("P6 end", 0)
    with Tally("P6", "ENOSPC, EDQUOT or EIO at an operation of the report and the final export") as tally:
        for index, error in always + draw.sample(cases, min(trials(1, len(cases)), len(cases))):
            run = copy_run(trained, tmp_path / f"{error}-{index}")
            with tally.trial(f"{error} at operation {index} ({names[index]}), seed {SEED}", run):
                ended = workshop.convert(run, fault="disk", window="final_phase", call=1, index=index, action=error)
                if ended.code or names[index] != "mkdir":  # libraries ask for the folder that is there, and do not mind
                    require_space_told(ended, error, run)
                assert not list(run.glob(".tmp-*"))
                workshop.finish(run)


@pytest.mark.full
def test_p6_a_log_that_takes_no_lines(workshop, tmp_path):
    """Of stage 3, whose only checkpoint is at its end, no line can be written for a while."""
    sparse = ("--set", "checkpoint.every_steps=100")
    with Tally("P6", "no room for the lines of the log") as tally:
        run = tmp_path / "in-time"
        with tally.trial("space comes before the checkpoint", run):
            ended = workshop.convert(run, *sparse, fault="full_log", first=5, times=2)
            assert ended.code == 0, ended.output
            assert ended.output.count("the lines are kept until the next checkpoint") == 1
            assert list(figures_of(run)) == list(figures_of(workshop.whole)), "the lines are in another order"
            compare_runs(run, workshop.whole)
        run = tmp_path / "waiting"
        with tally.trial("space comes while the checkpoint waits", run):
            ended = workshop.convert(run, *sparse, "--disk-wait", 60, fault="full_log", first=5, times=5)
            assert ended.code == 0, ended.output
            assert ended.output.count("more for space") == 2
            compare_runs(run, workshop.whole)
        run = tmp_path / "never"
        with tally.trial("no space comes", run):
            ended = workshop.convert(run, *sparse, fault="full_log", first=5, times=10**9)
            require_space_told(ended, "ENOSPC", run / "metrics.jsonl")
            require_checkpoints(run, at_least=4)
            workshop.finish(run, *sparse)


def test_p6_waiting_for_space(workshop, tmp_path):
    with Tally("P6", "--disk-wait: space comes in time, or it does not") as tally:
        run = tmp_path / "in-time"
        with tally.trial("space comes after three tries", run):
            ended = workshop.convert(run, "--disk-wait", 60, fault="full_disk", times=3)
            assert ended.code == 0, ended.output
            assert ended.output.count("more for space") == 3
            compare_runs(run, workshop.whole)
        run = tmp_path / "too-late"
        with tally.trial("no space comes", run):
            ended = workshop.convert(run, "--disk-wait", 0.3, fault="full_disk", times=10**9)
            assert ended.code == 74, ended.output
            assert "more for space" in ended.output
            workshop.finish(run)


def test_p6_a_limit_on_the_size_of_files(workshop, tmp_path):
    with Tally("P6", "a limit on the size of a file") as tally:
        for size in (1000, 50_000, 100_000) if IS_SOAK else (100_000,):
            run = tmp_path / f"limit-{size}"
            with tally.trial(f"{size} bytes", run):
                ended = workshop.convert(run, fault="limited", size=size)
                assert ended.code == 74, f"{ended.code}: {ended.output}"
                require_one_line(ended)
                require_checkpoints(run, at_least=0)
                workshop.finish(run)


def can_mount() -> bool:
    """Whether this user may mount a small disk in a namespace of its own."""
    unshare = shutil.which("unshare")
    probe = [unshare or "unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return unshare is not None and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs unshare and the right to mount a tmpfs in a namespace")
@pytest.mark.parametrize("freed", [True, False])
def test_p6_a_disk_that_is_really_full(workshop, tmp_path, freed):
    """A tmpfs of 16 MiB, filled to the last page before the fourth save."""
    with Tally("P6", "a real disk of 16 MiB, filled" + (" and freed while the run waits" if freed else "")) as tally:
        run = tmp_path / "disk"
        run.mkdir()
        with tally.trial(f"freed: {freed}", run):
            wait = ["--disk-wait", 30] if freed else []
            ended = workshop.convert(
                run, *wait, fault="tmpfs", place=str(run), size=16 * 2**20, filled_at=4, freed=freed
            )
            copy = Path(f"{run}.copy")
            if freed:
                assert ended.code == 0, ended.output
                assert "more for space" in ended.output
                compare_runs(copy, workshop.whole)
            else:
                assert ended.code == 74, ended.output
                require_one_line(ended)
                assert str(run) in ended.output
                assert "are free" in ended.output
                require_checkpoints(copy, at_least=3)
                workshop.finish(copy)
