"""A run that hangs or runs out of memory ends by name and keeps its last checkpoint; an export is whole or absent."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from mohawkify.files import atomic
from tests.files.faults import content_of
from tests.soak import IS_SOAK, SEED, chooser, trials
from tests.soak.runs import KILLED, Tally, copy_run, require_checkpoints, require_one_line

# Where a run hangs, and the newest checkpoint that it must have left.
HANGS = {"micro-batch": (5, 2), "update": (4, 3), "measuring": (2, 2)}


def test_p24_a_hang_ends_by_name(workshop, tmp_path):
    with Tally("P24", "a run that hangs, with --hang-timeout 2") as tally:
        for event, (number, steps) in list(HANGS.items())[: len(HANGS) if IS_SOAK else 1]:
            run = tmp_path / event.replace(" ", "-")
            with tally.trial(f"hangs at {event} {number}", run):
                begin = time.perf_counter()
                ended = workshop.convert(run, "--hang-timeout", 2, fault="at", events=[(event, number, "block")])
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


# The kinds of export, and how many of each sort of trial there are on every change and in a soak.
TARGETS = {"hf": ((3, None), (1, 20), (1, None)), "mlx-q4": ((1, None), (0, 20), (0, 20))}


@pytest.fixture(params=TARGETS)
def exported(request, workshop, tmp_path) -> Path:
    """An export that nothing disturbed; its folder has the name of the target."""
    if request.param.startswith("mlx"):
        pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    folder = tmp_path / "exported" / request.param
    ended = workshop.server.run(workshop.folder, "export", workshop.whole, "--target", folder.name, "--output", folder)
    assert ended.code == 0, ended.output
    return folder


def require_whole_or_absent(folder: Path, exported: Path) -> bool:
    """Fail unless an export is missing or like the one that nothing disturbed; returns whether it is there."""
    if not folder.exists():
        return False
    assert content_of(folder).keys() == content_of(exported).keys()
    atomic.verify_directory(folder)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (exported / weights).read_bytes()
    return True


def without_notes(run: Path) -> dict[str, bytes]:
    """What a run holds, but for the notes of which tokenised text was found to be as it was written."""
    return {name: content for name, content in content_of(run).items() if "/.checked-" not in name}


def test_p22_an_export_is_whole_or_absent(workshop, exported, tmp_path):
    run, count_to = copy_run(workshop.whole, tmp_path / "run"), tmp_path / "count.json"

    target = exported.name
    at_operations, at_times, on_full_disks = TARGETS[target]

    def arguments(output: Path) -> list[str]:
        return ["export", str(run), "--target", target, "--output", str(output)]

    begin = time.perf_counter()
    ended = workshop.server.run(
        workshop.folder, *arguments(tmp_path / "first"), fault="disk", window="export", call=1, index=-1,
        action="SIGKILL", count_to=str(count_to),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    assert ended.code == 0, ended.output
    names = json.loads(count_to.read_text())
    draw = chooser("P22" if target == "hf" else f"P22 {target}", 0)
    before = without_notes(run)
    what = "an export" if target == "hf" else f"an export to {target}"
    with Tally("P22", f"SIGKILL or a full disk during {what}") as tally:
        number = min(trials(at_operations[0], at_operations[1] or len(names)), len(names))
        for index in sorted(draw.sample(range(len(names)), number)):
            output = tmp_path / f"kill-{index}" / target
            with tally.trial(f"killed at operation {index} ({names[index]}), seed {SEED}", output.parent):
                ended = workshop.server.run(
                    workshop.folder, *arguments(output), fault="disk", window="export", call=1, index=index,
                    action="SIGKILL",
                )  # fmt: skip
                assert ended.code == KILLED, ended.output
                tally.note("whole after the kill", require_whole_or_absent(output, exported))
                again(workshop, arguments(output), output, exported)
        for trial in range(trials(*at_times)):
            output = tmp_path / f"time-{trial}" / target
            with tally.trial(f"killed at a random time, trial {trial} of seed {SEED}", output.parent):
                child = workshop.server.start(workshop.folder, *arguments(output))
                time.sleep(draw.uniform(0, seconds))
                child.send(signal.SIGKILL)
                child.wait()
                tally.note("whole after the kill", require_whole_or_absent(output, exported))
                again(workshop, arguments(output), output, exported)
        # In any case once where safetensors tells it in words.
        cases = [(index, error) for error in ("ENOSPC", "EDQUOT", "EIO") for index in range(len(names))]
        number = min(trials(on_full_disks[0], on_full_disks[1] or len(cases)), len(cases))
        in_words = [(names.index("save_file"), "ENOSPC")] if "save_file" in names else []
        for index, error in in_words + draw.sample(cases, number):
            output = tmp_path / f"{error}-{index}" / target
            with tally.trial(f"{error} at operation {index} ({names[index]}), seed {SEED}", output.parent):
                ended = workshop.server.run(
                    workshop.folder, *arguments(output), fault="disk", window="export", call=1, index=index,
                    action=error,
                )  # fmt: skip
                # Libraries make sure of folders that are there, and Python tries out where temporary files may lie.
                if ended.code == 0 and names[index] in ("mkdir", "create", "write"):
                    assert require_whole_or_absent(output, exported)
                    continue
                assert ended.code == 74, f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                assert error == "EIO" or re.search(r"[\d,]+ bytes are needed, [\d,]+ are free", ended.output)
                require_nothing_left(output, exported)
                again(workshop, arguments(output), output, exported)
        assert without_notes(run) == before, "an export has changed its run"


@pytest.mark.full
@pytest.mark.parametrize("target", ["hf", "mlx-q4"])
def test_p22_an_export_beyond_the_limit_on_the_size_of_files(workshop, tmp_path, target):
    if target != "hf":
        pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    output = tmp_path / "exports" / target
    arguments = ["export", workshop.whole, "--target", target, "--output", output]
    with Tally("P22", f"an export to {target} beyond the limit on the size of a file") as tally, tally.trial("4 kB"):
        ended = workshop.server.run(workshop.folder, *arguments, fault="limited", size=4_000)
        assert ended.code == 74, f"ended with {ended.code}: {ended.output}"
        require_one_line(ended)
        assert str(output) in ended.output
        assert "ulimit -f" in ended.output
        assert list(output.parent.iterdir()) == []


def require_nothing_left(output: Path, exported: Path) -> None:
    """Fail where a failed export left anything but a whole folder, which only the flush behind the rename can leave."""
    require_whole_or_absent(output, exported)
    assert [path.name for path in output.parent.glob("*") if path != output] == []


def again(workshop, arguments: list[str], output: Path, exported: Path) -> None:
    """Export once more: it must succeed, after the folder is removed where it is whole already."""
    shutil.rmtree(output, ignore_errors=True)
    ended = workshop.server.run(workshop.folder, *arguments)
    assert ended.code == 0, ended.output
    assert require_whole_or_absent(output, exported)
    assert [path.name for path in output.parent.iterdir()] == [output.name], "what was killed is left over"
