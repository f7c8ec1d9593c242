"""Several processes: one that hangs or is stopped ends all by name, and a run goes on in another number of them."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.soak import IS_SOAK, SEED, chooser, trials
from tests.soak.runs import Tally, Workshop, figures_of, require_checkpoints
from tests.soak.server import Child, Ended

SINGLE = ("--set", "compute.micro_batch_sequences=1")
# The rank of the process that it happens to, and when.
HANGS = {
    "the second process is stopped": (1, "micro-batch", 5, "SIGSTOP"),
    "the main process is stopped, and with it what they share": (0, "micro-batch", 5, "SIGSTOP"),
    "the main process hangs in a save": (0, "tensors saved", 3, "block"),
    "the main process is stopped in a save": (0, "tensors saved", 3, "SIGSTOP"),
    "the second process cannot read its text": (1, "reading", 3, "block"),
}
PATIENCE = 4


def start(workshop: Workshop, run: Path, size: int, *more: Any, faults: dict[int, Any] | None = None) -> list[Child]:
    """Start a conversion in several processes, as a launcher without a store of its own does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        environment = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        fault: dict[str, Any] = {"fault": "at", "events": [faults[rank]]} if faults and rank in faults else {}
        options = (*SINGLE, *(("--engine", "fsdp") if size > 1 else ()), *more)
        children.append(workshop.start(run, *options, environment=environment, **fault))
    return children


def all_ended(children: list[Child]) -> list[Ended]:
    return [child.wait() for child in children]


@pytest.mark.full
def test_p24_a_hang_in_one_of_two_processes_ends_both(workshop, tmp_path):
    with Tally("P24", f"one of two processes hangs or is stopped, with --hang-timeout {PATIENCE}") as tally:
        for number, (name, (rank, *event)) in enumerate(list(HANGS.items())[: len(HANGS) if IS_SOAK else 1]):
            run = tmp_path / f"hang-{number}"
            with tally.trial(name, run):
                begin = time.perf_counter()
                children = start(workshop, run, 2, "--hang-timeout", PATIENCE, faults={rank: event})
                is_stopped = event[-1] == "SIGSTOP"
                living = [child for place, child in enumerate(children) if not (is_stopped and place == rank)]
                ended = [child.wait() for child in living]
                tally.note_most("slowest in seconds", time.perf_counter() - begin)
                if is_stopped:
                    children[rank].send(signal.SIGKILL)
                assert [end.code for end in ended] == [75] * len(living), [end.output for end in ended]
                for end in ended:
                    assert "most recent call first" in end.output, "the stacks are missing"
                said = [line for end in ended for line in end.output.splitlines() if line.startswith("error: ")]
                assert len(said) == 1, said
                assert "no progress for" in said[0]
                assert require_checkpoints(run) >= 1
                children[rank].wait()
                (last,) = all_ended(start(workshop, run, 1))
                assert last.code == 0, last.output


@pytest.mark.skipif(not IS_SOAK, reason="a part of make soak")
def test_p12_another_number_of_processes_goes_on(workshop, tmp_path):
    whole = tmp_path / "whole"
    assert workshop.convert(whole, *SINGLE).code == 0
    expected = figures_of(whole)
    with Tally("P12", "4, 2, 4 and 1 processes one after the other, one of them asked to stop") as tally:
        for trial in range(trials(1, 3)):
            run, draw = tmp_path / f"sizes-{trial}", chooser("P12", trial)
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                for size, last in ((4, 2), (2, 4), (4, 6)):
                    rank = draw.randrange(size)
                    done = len(figures_of(run)) if run.exists() else 0
                    stop = ("micro-batch", 4 // size * (last - done), "SIGTERM")
                    ended = all_ended(start(workshop, run, size, faults={rank: stop}))
                    assert [end.code for end in ended] == [143] * size, [end.output for end in ended]
                    assert require_checkpoints(run) == last
                (end,) = all_ended(start(workshop, run, 1))
                assert end.code == 0, end.output
                found = figures_of(run)
                assert found.keys() == expected.keys()
                for step, line in expected.items():
                    assert found[step]["learning_rate"] == line["learning_rate"]
                    assert found[step]["tokens"] == line["tokens"]
                    assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5), f"step {step}"
