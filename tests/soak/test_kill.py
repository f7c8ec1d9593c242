"""Killed at any moment, a conversion continues to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.soak import IS_SOAK, SEED, chooser, trials
from tests.soak.inside import EVENTS, size_of
from tests.soak.runs import KILLED, OPTIONS, Tally, compare_runs, copy_run, figures_of, kept, require_checkpoints
from tests.soak.server import ENVIRONMENT


def test_p1_kills_at_random_times(workshop, tmp_path):
    with Tally("P1", "SIGKILL at random times, then the same call") as tally:
        for trial in range(trials(6, 200)):
            draw, run, newest = chooser("P1", trial), tmp_path / f"kill-{trial}", 0
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                for _ in range(draw.randint(2, 4)):
                    child = workshop.start(run)
                    time.sleep(draw.uniform(0.0, workshop.seconds))
                    child.send(signal.SIGKILL)
                    if child.wait().code != KILLED:
                        break
                    tally.note("kills", 1)
                    tally.note("kills in a save", any(run.glob("checkpoints/.tmp-*")))
                    tally.note("kills in the final export", any(run.glob(".tmp-final-*")))
                    newest = require_checkpoints(run, at_least=newest)
                workshop.finish(run)


@pytest.mark.full
def test_p1_kills_through_the_real_command(workshop, tmp_path):
    script = Path(sys.executable).parent / "mohawkify"
    with Tally("P1", "the installed command, killed when its log has grown to a random line") as tally:
        for trial in range(trials(2, 12)):
            draw, run = chooser("P1 command", trial), tmp_path / f"command-{trial}"
            arguments = ["convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", run, *OPTIONS]
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                with subprocess.Popen(
                    [script, *arguments], cwd=workshop.folder, env={**os.environ, **ENVIRONMENT},
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                ) as process:  # fmt: skip
                    lines, log = draw.randint(1, 6), run / "metrics.jsonl"
                    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
                        time.sleep(0.002)
                    process.kill()
                assert process.returncode == KILLED, f"ended with {process.returncode} before it could be killed"
                tally.note("kills", 1)
                done = subprocess.run(
                    [script, *arguments], cwd=workshop.folder, env={**os.environ, **ENVIRONMENT},
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                compare_runs(run, workshop.whole)


def operations(workshop, run: Path, window: str, call: int, count_to: Path) -> list[str]:
    """The names of the operations on the disk in one call of a window, learned from a run that nothing disturbs."""
    ended = workshop.convert(run, fault="disk", window=window, call=call, index=-1, action="SIGKILL",
                             count_to=str(count_to))  # fmt: skip
    assert ended.code == 0, ended.output
    return json.loads(count_to.read_text())


def test_p2_kills_at_every_operation(workshop, tmp_path):
    """A save that also rotates, in every stage, and the final export, at each of their operations."""
    windows = [("save", call) for call in (2, 4, 6)] + [("final_phase", 1)]
    with Tally("P2", "SIGKILL at an operation of save, rotation and final export") as tally:
        for window, call in windows if IS_SOAK else windows[2:]:
            names = operations(workshop, tmp_path / "count", window, call, tmp_path / "count.json")
            tally.note(f"operations of {window} {call}", len(names))
            shutil.rmtree(tmp_path / "count")
            draw, number = chooser(f"P2 {window} {call}", 0), min(trials(2, len(names)), len(names))
            for index in sorted(draw.sample(range(len(names)), number)):
                run = tmp_path / f"{window}-{call}-{index}"
                with tally.trial(f"{window} {call}, operation {index} ({names[index]})", run):
                    ended = workshop.convert(run, fault="disk", window=window, call=call, index=index, action="SIGKILL")
                    assert ended.code == KILLED, f"ended with {ended.code}: {ended.output}"
                    require_checkpoints(run, at_least=call - 1 if window == "save" else 7)
                    workshop.finish(run)


def test_p3_chains_of_six_segments(workshop, tmp_path):
    with Tally("P3", "six segments of 0, 1 or 2 steps, each killed") as tally:
        for trial in range(trials(1, 20)):
            draw, run = chooser("P3", trial), tmp_path / f"chain-{trial}"
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                for _ in range(5):
                    steps = draw.choice((0, 1, 1, 2))
                    before = len(figures_of(run))
                    ended = workshop.convert(run, fault="at", events=[("update", steps + 1, "SIGKILL")])
                    if ended.code == 0:
                        break
                    assert ended.code == KILLED, ended.output
                    assert len(figures_of(run)) - before == steps
                    tally.note("segments", 1)
                workshop.finish(run)


def test_p7_the_disk_is_bounded(workshop, tmp_path):
    keep, checkpoint = 2, size_of(next((workshop.whole / "checkpoints").iterdir()))
    promise = "at most keep + 2 checkpoints, counted and in bytes, before every operation on the disk"
    with Tally("P7", promise) as tally:
        for trial in range(trials(2, 20)):
            draw, run = chooser("P7", trial), tmp_path / f"bound-{trial}"
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                # A kill between save and rotation leaves one checkpoint more; several such kills must not add up.
                # Every other time one in the final export follows.
                events = draw.sample(("rotating", "tensors saved", "rotating"), 3) + ["weights written"] * (trial % 2)
                for kill, event in enumerate(events):
                    number = 1 if kill else draw.randint(3, 4)
                    ended = workshop.convert(run, fault="at", events=[(event, number, "SIGKILL")])
                    assert ended.code == KILLED, ended.output
                    give_numbers_to_the_living(run)
                said = tmp_path / f"most-{trial}"
                ended = workshop.convert(run, fault="bounded", output=str(run), say_to=str(said))
                assert ended.code == 0, ended.output
                most = json.loads(said.read_text())
                assert most["checkpoints"] <= keep + 2  # the best student's may be older than those that are kept
                assert most["bytes"] <= size_of(workshop.whole) + 2.1 * checkpoint  # the finished run holds `keep`
                compare_runs(run, workshop.whole)


def give_numbers_to_the_living(run: Path) -> None:
    """Let what a killed process left carry the number of a living one, as where numbers are given out again."""
    for path in list(run.rglob(".tmp-*")):
        path.rename(path.with_name(f"{path.name.rpartition('-')[0]}-{os.getpid()}"))


@pytest.fixture(scope="module")
def between(workshop, tmp_path_factory) -> Path:
    """A run that was killed when it had finished its first stage and was about to measure."""
    run = tmp_path_factory.mktemp("between") / "run"
    ended = workshop.convert(run, fault="at", events=[("measuring", 2, "SIGKILL")])
    assert ended.code == KILLED, ended.output
    return run


def test_p20_between_the_stages(workshop, between, tmp_path):
    with Tally("P20", "killed between stages; then the same, another recipe, teacher or text") as tally:
        for number in (1, 2, 3, 4) if IS_SOAK else (2, 4):
            run = tmp_path / f"border-{number}"
            with tally.trial(f"killed before measurement {number}", run):
                ended = workshop.convert(run, fault="at", events=[("measuring", number, "SIGKILL")])
                assert ended.code == KILLED, ended.output
                workshop.finish(run)
        run = copy_run(between, tmp_path / "other")
        with tally.trial("another recipe", run):
            workshop.refused(run, 2, "another recipe", "--set", "seed=1")
        teacher, text = workshop.folder / "tiny-llama" / "model.safetensors", workshop.folder / "tiny-llama/text.txt"
        run = copy_run(between, tmp_path / "teacher")
        with tally.trial("another teacher", run), kept(teacher) as data:
            teacher.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            workshop.refused(run, 2, "another teacher")
        run = copy_run(between, tmp_path / "text")
        with tally.trial("other text", run), kept(text) as data:
            text.write_bytes(data.replace(b"cat", b"dog"))
            workshop.refused(run, 66, "other text")
        run = copy_run(between, tmp_path / "same")
        with tally.trial("everything back in its place", run):
            workshop.finish(run)


def test_every_moment_that_trials_wait_for_comes(workshop, tmp_path):
    """A function of another name would otherwise make trials pass that tried nothing."""
    marks = {event: tmp_path / event for event in EVENTS}
    ended = workshop.convert(
        tmp_path / "run", fault="at", events=[(event, 1, f"touch {mark}") for event, mark in marks.items()]
    )
    assert ended.code == 0, ended.output
    assert [event for event, mark in marks.items() if not mark.exists()] == []
