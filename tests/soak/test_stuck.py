"""A run that hangs or runs out of memory ends by name and keeps its last checkpoint; an export is whole or absent."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from mohawkify import storage
from tests.faults import content_of
from tests.soak import IS_SOAK, SEED, chooser, trials
from tests.soak.runs import KILLED, Tally, copy_run, require_checkpoints, require_one_line

# Where a run hangs, and the newest checkpoint that it must have left.
HANGS = {"micro-batch": (5, 2), "update": (4, 3), "measuring": (2, 2)}


def test_p24_a_hang_ends_by_name(workshop, tmp_path):
    with Tally("P24", "a run that hangs, with --patience 2") as tally:
        for event, (number, steps) in list(HANGS.items())[: len(HANGS) if IS_SOAK else 1]:
            run = tmp_path / event.replace(" ", "-")
            with tally.trial(f"hangs at {event} {number}", run):
                begin = time.perf_counter()
                ended = workshop.convert(run, "--patience", 2, fault="at", events=[(event, number, "block")])
                tally.note_most("slowest in seconds", time.perf_counter() - begin)
                assert ended.code == 75, f"ended with {ended.code}: {ended.output}"
                assert "error: no progress for" in ended.output
                assert "most recent call first" in ended.output, "the stacks are missing"
                assert "in _action" in ended.output or "inside.py" in ended.output
                assert require_checkpoints(run) == steps
                workshop.finish(run)


FULL = {"loading": 1, "building": 1, "measuring": 2, "micro-batch": 6, "update": 5, "saving": 4}


def test_p25_no_memory_left(workshop, tmp_path):
    with Tally("P25", "out of memory at several places") as tally:
        events = list(FULL)
        for event in events if IS_SOAK else chooser("P25", 0).sample(events, 2):
            run = tmp_path / event
            with tally.trial(f"out of memory at {event} {FULL[event]}", run):
                ended = workshop.convert(run, fault="at", events=[(event, FULL[event], "memory")])
                assert ended.code == 71, f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                assert "micro_batch_sequences" in ended.output
                require_checkpoints(run, at_least=0)
                workshop.finish(run)


def test_p25_a_real_allocation_fails(workshop, tmp_path):
    """Sequences 64 times as long as before, in a process that gets no more than 4 MB of address space for them."""
    keys = {"stages.distill.sequence_length": 1024, "stages.distill.tokens": 8192, "data.epochs": "null"}
    long = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    run, first = tmp_path / "run", 9  # micro-batch of the last stage
    with Tally("P25", "a limit on the address space when a stage begins") as tally, tally.trial("stage 3", run):
        events = [("micro-batch", first, "memory limit 4000000")]
        ended = workshop.convert(run, *long, fault="at", events=events)
        assert ended.code == 71, f"ended with {ended.code}: {ended.output}"
        require_one_line(ended)
        assert "--set compute.micro_batch_sequences=1" in ended.output
        assert require_checkpoints(run) == 4
        ended = workshop.convert(run, *long, "--set", "compute.micro_batch_sequences=1")
        assert ended.code == 0, ended.output


@pytest.fixture(scope="module")
def exported(workshop, tmp_path_factory) -> Path:
    """An export that nothing disturbed."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    ended = workshop.server.run(workshop.folder, "export", workshop.whole, "--target", "hf", "--output", folder)
    assert ended.code == 0, ended.output
    return folder


def require_whole_or_absent(folder: Path, exported: Path) -> bool:
    """Fail unless an export is missing or like the one that nothing disturbed; returns whether it is there."""
    if not folder.exists():
        return False
    assert content_of(folder).keys() == content_of(exported).keys()
    storage.verify_directory(folder)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (exported / weights).read_bytes()
    return True


def test_p22_an_export_is_whole_or_absent(workshop, exported, tmp_path):
    run, count_to = copy_run(workshop.whole, tmp_path / "run"), tmp_path / "count.json"

    def arguments(output: Path) -> list[str]:
        return ["export", str(run), "--target", "hf", "--output", str(output)]

    begin = time.perf_counter()
    ended = workshop.server.run(
        workshop.folder, *arguments(tmp_path / "first"), fault="disk", window="export", call=1, index=-1,
        action="SIGKILL", count_to=str(count_to),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    assert ended.code == 0, ended.output
    names = json.loads(count_to.read_text())
    draw = chooser("P22", 0)
    before = content_of(run)
    with Tally("P22", "SIGKILL or a full disk during an export") as tally:
        for index in sorted(draw.sample(range(len(names)), min(trials(3, len(names)), len(names)))):
            output = tmp_path / f"kill-{index}" / "hf"
            with tally.trial(f"killed at operation {index} ({names[index]}), seed {SEED}", output.parent):
                ended = workshop.server.run(
                    workshop.folder, *arguments(output), fault="disk", window="export", call=1, index=index,
                    action="SIGKILL",
                )  # fmt: skip
                assert ended.code == KILLED, ended.output
                tally.note("whole after the kill", require_whole_or_absent(output, exported))
                again(workshop, arguments(output), output, exported)
        for trial in range(trials(1, 20)):
            output = tmp_path / f"time-{trial}" / "hf"
            with tally.trial(f"killed at a random time, trial {trial} of seed {SEED}", output.parent):
                child = workshop.server.start(workshop.folder, *arguments(output))
                time.sleep(draw.uniform(0, seconds))
                child.send(signal.SIGKILL)
                child.wait()
                tally.note("whole after the kill", require_whole_or_absent(output, exported))
                again(workshop, arguments(output), output, exported)
        for trial in range(trials(1, 5)):
            output, index = tmp_path / f"full-{trial}" / "hf", draw.randrange(len(names) - 1)
            with tally.trial(f"disk full at operation {index} ({names[index]}), seed {SEED}", output.parent):
                ended = workshop.server.run(
                    workshop.folder, *arguments(output), fault="disk", window="export", call=1, index=index,
                    action="ENOSPC",
                )  # fmt: skip
                assert ended.code in (73, 74), f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                assert not output.exists()
                again(workshop, arguments(output), output, exported)
        assert content_of(run) == before, "an export has changed its run"


def again(workshop, arguments: list[str], output: Path, exported: Path) -> None:
    """Export once more: it must succeed, after the folder is removed where it is whole already."""
    shutil.rmtree(output, ignore_errors=True)
    ended = workshop.server.run(workshop.folder, *arguments)
    assert ended.code == 0, ended.output
    assert require_whole_or_absent(output, exported)
