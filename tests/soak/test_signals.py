"""Asked to stop, a run stops with all it has done; and of several processes only one works in a folder."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.files.faults import content_of
from tests.soak import SEED, chooser, trials
from tests.soak.inside import EVENTS
from tests.soak.runs import KILLED, Tally, compare_runs, figures_of, require_checkpoints, require_one_line
from tests.soak.server import Child, wait_for

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SLOWEST = 20.0  # seconds from a signal to the end; generous, for a busy machine
# How often each moment comes in a run of 7 steps with 2 micro-batches and 4 measurements.
TIMES = dict.fromkeys(("loading", "tokenising", "building", "final_teacher", "weights written"), 1) | {
    "measuring": 4, "measuring a batch": 8, "reading": 7, "micro-batch": 14,
    "update": 7, "logging": 7, "saving": 7, "tensors saved": 7, "rotating": 7,
}  # fmt: skip


@contextmanager
def gate(fifo: Path) -> Iterator[Any]:
    """A gate at which children wait; calling what is handed out lets one through."""
    os.mkfifo(fifo)
    handle = os.open(fifo, os.O_RDWR)
    try:
        yield lambda: os.write(handle, b".")
    finally:
        os.close(handle)


def test_p9_a_request_to_stop_at_any_moment(workshop, tmp_path):
    assert TIMES.keys() == EVENTS.keys()
    order = chooser("P9 order", 0).sample(sorted(EVENTS), len(EVENTS))
    with Tally("P9", "SIGTERM or SIGINT at a random moment, then the same call") as tally:
        for trial in range(trials(4, 40)):
            draw, run = chooser("P9", trial), tmp_path / f"signal-{trial}"
            event = order[trial % len(order)]
            number, which = draw.randint(1, TIMES[event]), draw.choice(list(CODES))
            fifo = tmp_path / f"gate-{trial}"
            with tally.trial(f"trial {trial} of seed {SEED}: {which.name} at {event} {number}", run), gate(fifo) as go:
                child = workshop.start(run, fault="at", events=[(event, number, f"hold {fifo}")])
                wait_for(fifo.with_suffix(".here"))
                begin = time.perf_counter()
                child.send(which)
                go()
                ended = child.wait()
                seconds = time.perf_counter() - begin
                assert ended.code == CODES[which], f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                assert seconds < SLOWEST
                tally.note_most("slowest in seconds", seconds)
                done = len(figures_of(run)) if run.exists() else 0
                assert require_checkpoints(run, at_least=0) == done, "a step was lost"
                workshop.finish(run)


def test_p9_a_second_request_ends_at_once(workshop, tmp_path):
    with Tally("P9", "a second Ctrl-C while a checkpoint is written") as tally:
        for trial in range(trials(2, 10)):
            draw, run, fifo = chooser("P9 second", trial), tmp_path / f"second-{trial}", tmp_path / f"gate-{trial}"
            number = draw.randint(2, 7)
            with tally.trial(f"trial {trial} of seed {SEED}, save {number}", run), gate(fifo):
                child = workshop.start(run, fault="at", events=[("tensors saved", number, f"hold {fifo}")])
                wait_for(fifo.with_suffix(".here"))
                child.send(signal.SIGINT)
                wait_until_heard(child)
                begin = time.perf_counter()
                child.send(signal.SIGINT)
                ended = child.wait()
                # Ended by the signal itself, which a shell calls 130 too.
                assert ended.code in (130, -signal.SIGINT), f"ended with {ended.code}: {ended.output}"
                assert time.perf_counter() - begin < SLOWEST
                assert require_checkpoints(run) == number - 1
                workshop.finish(run)


def wait_until_heard(child: Child) -> None:
    """Wait until a first request has been noted, after which SIGTERM has its ordinary meaning again."""
    status, bit = Path(f"/proc/{child.pid}/status"), 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + SLOWEST
    while int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & bit:  # type: ignore[index]
        assert time.monotonic() < deadline, "the request to stop was not noted"
        time.sleep(0.002)


def test_p10_of_many_at_once_one_works(workshop, tmp_path):
    with Tally("P10", "8 starts at once on one folder") as tally:
        for round_number in range(trials(1, 20)):
            run, fifo = tmp_path / f"crowd-{round_number}", tmp_path / f"gate-{round_number}"
            with tally.trial(f"round {round_number}", run), gate(fifo) as go:
                hold = [("loading", 1, f"hold {fifo}")]
                begin = time.perf_counter()
                children = [workshop.start(run, fault="at", events=hold) for _ in range(8)]
                wait_for(fifo.with_suffix(".here"))
                winner = int((run / ".lock").read_text())
                before = without_probes(run)
                ended = [child.wait(SLOWEST) for child in children if child.pid != winner]
                tally.note_most("slowest refusal in seconds", time.perf_counter() - begin)
                assert [end.code for end in ended] == [2] * 7
                assert all(f"another process (pid {winner})" in end.output for end in ended)
                assert content_of(run) == before, "a process that was refused has changed the folder"
                go()
                (last,) = (child.wait() for child in children if child.pid == winner)
                assert last.code == 0, last.output
                compare_runs(run, workshop.whole)


def without_probes(run: Path) -> dict[str, bytes]:
    """The content of a folder, without what a process writes and removes at once to see whether it may write there."""
    for _ in range(100):
        try:
            return {name: data for name, data in content_of(run).items() if not name.startswith(".tmp-probe-")}
        except FileNotFoundError:
            continue
    raise AssertionError(f"the content of {run} does not come to rest")


def test_p10_the_lock_of_a_killed_process_is_free(workshop, tmp_path):
    run = tmp_path / "run"
    draw = chooser("P10 kill", 0)
    with Tally("P10", "the next start after a SIGKILL gets the folder") as tally:
        for kill in range(trials(4, 50)):
            event = draw.choice(("loading", "building"))
            with tally.trial(f"kill {kill} at {event}"):
                ended = workshop.convert(run, fault="at", events=[(event, 1, "SIGKILL")])
                assert ended.code == KILLED, ended.output
        with tally.trial("the last start", run):
            workshop.finish(run)
