"""Damaged checkpoints, teachers and students are noticed, whatever the damage; a run falls back and says so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mohawkify.errors import CheckpointError
from mohawkify.files import atomic
from mohawkify.run import checkpoint
from tests.soak import SEED, chooser, trials
from tests.soak.runs import KILLED, Tally, copy_run, kept, require_one_line


@pytest.fixture(scope="module")
def stopped(workshop, tmp_path_factory) -> Path:
    """A run that was killed after its fifth step; it has the checkpoints of steps 4 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    ended = workshop.convert(run, fault="at", events=[("update", 6, "SIGKILL")])
    assert ended.code == KILLED, ended.output
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [
        "step-00000004",
        "step-00000005",
    ]
    return run


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def zero_tail(data: bytes, draw: random.Random) -> bytes:
    cut = draw.randrange(len(data.rstrip(b"\0")))
    return data[:cut] + bytes(len(data) - cut)


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 9))


DAMAGES: dict[str, tuple[Callable[[bytes, random.Random], bytes], int, int]] = {
    "flipped bit": (flip, 100, 2000),
    "truncated": (truncate, 30, 500),
    "tail of zeros": (zero_tail, 20, 200),
    "longer": (append, 10, 100),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_p5_a_damaged_checkpoint_is_passed_over(stopped, tmp_path, kind):
    change, on_change, in_soak = DAMAGES[kind]
    run = copy_run(stopped, tmp_path / "run")
    files = sorted((run / "checkpoints" / "step-00000005").iterdir())
    with Tally("P5", f"{kind} in a file of a checkpoint") as tally:
        for trial in range(trials(on_change, in_soak)):
            draw = chooser(f"P5 {kind}", trial)
            file = files[trial % len(files)]
            with tally.trial(f"trial {trial} of seed {SEED}, {file.name}"), kept(file) as data:
                file.write_bytes(change(data, draw))
                assert_fallback(run, file.name)
        assert len(files) == 5


def assert_fallback(run: Path, named: str) -> None:
    said: list[str] = []
    found = checkpoint.newest_valid(run / "checkpoints", said.append)
    assert found is not None
    assert found.global_step == 4
    assert len(said) == 1
    assert "step-00000005" in said[0]
    assert named in said[0]


def test_p5_files_that_are_swapped_missing_extra_or_of_another_step(stopped, tmp_path):
    with Tally("P5", "files swapped, missing, extra or of another step") as tally:
        names = sorted(path.name for path in (stopped / "checkpoints" / "step-00000005").iterdir())
        for name in names:
            run = copy_run(stopped, tmp_path / "run")
            new, old = run / "checkpoints" / "step-00000005", run / "checkpoints" / "step-00000004"
            data = (new / name).read_bytes()
            with tally.trial(f"{name} of another step"):
                (new / name).write_bytes((old / name).read_bytes())
                said = checkpoint.newest_valid(run / "checkpoints", [].append)
                # The generators may not have moved, and then the file is the same.
                assert said is not None
                assert said.global_step == (4 if (old / name).read_bytes() != data else 5)
            with tally.trial(f"{name} missing"):
                (new / name).unlink()
                assert_fallback(run, name)
            (new / name).write_bytes(data)
            other = new / names[(names.index(name) + 1) % len(names)]
            with tally.trial(f"{name} and {other.name} swapped"), kept(other) as content:
                other.write_bytes(data)
                (new / name).write_bytes(content)
                assert_fallback(run, "step-00000005")
            (new / name).write_bytes(data)
            with tally.trial(f"{name} twice", run):
                (new / f"{name}.copy").write_bytes(data)
                assert_fallback(run, f"{name}.copy")


def test_p5_a_run_falls_back_and_ends_with_the_same_bits(workshop, stopped, tmp_path):
    with Tally("P5", "a run continues from the checkpoint before the damaged one") as tally:
        for trial in range(trials(2, 50)):
            draw, run = chooser("P5 run", trial), copy_run(stopped, tmp_path / f"fallback-{trial}")
            with tally.trial(f"trial {trial} of seed {SEED}", run):
                file = draw.choice(sorted((run / "checkpoints" / "step-00000005").iterdir()))
                change = draw.choice([change for change, _, _ in DAMAGES.values()])
                file.write_bytes(change(file.read_bytes(), draw))
                workshop.finish(run)


def test_p5_a_damaged_teacher_is_refused(workshop, stopped, tmp_path):
    teacher = workshop.folder / "tiny-llama"
    recorded = json.loads((stopped / "teacher.json").read_text())["files"]
    run = copy_run(stopped, tmp_path / "run")
    with Tally("P5", "a flipped bit in a recorded file of the teacher, then the same call") as tally:
        for trial in range(trials(len(recorded), 60)):
            draw, name = chooser("P5 teacher", trial), sorted(recorded)[trial % len(recorded)]
            with tally.trial(f"trial {trial} of seed {SEED}, {name}"), kept(teacher / name) as data:
                (teacher / name).write_bytes(flip(data, draw))
                workshop.refused(run, (2, 64, 66), "error: ")
        with tally.trial("everything back in its place"):
            workshop.finish(run)


def test_p5_a_damaged_student_is_noticed(workshop, tmp_path):
    run = copy_run(workshop.whole, tmp_path / "run")
    files = sorted(path for path in (run / "final").iterdir())
    with Tally("P5", "damage in a file of final/") as tally:
        for trial in range(trials(len(files), 500)):
            draw, file = chooser("P5 final", trial), files[trial % len(files)]
            change = draw.choice([change for change, _, _ in DAMAGES.values()])
            with tally.trial(f"trial {trial} of seed {SEED}, {file.name}"), kept(file) as data:
                file.write_bytes(change(data, draw))
                with pytest.raises(CheckpointError, match=file.name):
                    atomic.verify_directory(run / "final")


@pytest.mark.parametrize("command", [("generate", "RUN", "once"), ("eval", "RUN"), ("export", "RUN", "--target", "hf")])
def test_p5_a_damaged_student_is_not_used(workshop, tmp_path, command):
    run = copy_run(workshop.whole, tmp_path / "run")
    with Tally("P5", f"a flipped bit in the student's weights, then {command[0]}") as tally:
        for trial in range(trials(1, 5)):
            file, draw = run / "final" / "model.safetensors", chooser(f"P5 {command[0]}", trial)
            with tally.trial(f"trial {trial} of seed {SEED}"), kept(file) as data:
                # In the numbers, which safetensors itself would load.
                file.write_bytes(data[: len(data) // 2] + flip(data[len(data) // 2 :], draw))
                arguments = [str(run) if argument == "RUN" else argument for argument in command]
                ended = workshop.server.run(workshop.folder, *arguments)
                assert ended.code == 66, f"ended with {ended.code}: {ended.output}"
                require_one_line(ended)
                assert "model.safetensors" in ended.output
