"""Trackers: what reaches them, the same run after a stop, and a run that outlives them."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest

from mohawkify.distributed.shutdown import Interrupted
from mohawkify.errors import CheckpointError, MissingExtraError
from mohawkify.files.atomic import read_lines
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.train import tracking
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.progress import StageProgress
from mohawkify.train.trainer import convert
from tests.commands import make_teacher, run
from tests.data.test_teacher_logits import RECIPE


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("track") / "teacher")


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard's files hold under a tag, by step; of a step that was logged twice the later point."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[int, float] = {}
    for file in sorted(folder.glob("events.out.*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = value.simple_value
            place += 12 + size + 4
    return found


def test_tensorboard_has_every_step_of_a_run_that_was_stopped(teacher, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    recipe = apply_overrides(parse_recipe(RECIPE, "r"), ["stages.distill.final_phase=null"])
    update, stops = StageProgress.update, [3]

    def update_and_stop(self, report):
        update(self, report)
        if stops and report.step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "update", update_and_stop)
    options = ConvertOptions(output=tmp_path / "run", report=print, track=("tensorboard",))
    with pytest.raises(Interrupted):
        convert(str(teacher), recipe, options)
    done = convert(str(teacher), recipe, options)
    folders = list((done.tracking / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == [f"teacher-mohawk-{tracking.tracking_id(done.tracking_file)}"]
    lines = {line["global_step"]: line["loss"] for line in read_lines(done.metrics_file)}
    assert scalars(folders[0], "distill/loss") == pytest.approx(lines, rel=1e-6)
    held_out = scalars(folders[0], "held-out/kl")
    assert held_out == pytest.approx({0: done.results()["stages"]["init"]["kl"], 10: done.results()["student"]["kl"]})


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(teacher, tmp_path):
    pytest.importorskip("tensorboardX")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the tracker wants a folder")
    lines: list[str] = []
    shown = tracking.TrackedRun("p", "i", "r", blocked, {})
    tracked = tracking.Tracking(["tensorboard"], 0, shown, lines.append)
    for step in range(1, 4):
        tracked.log({"loss": 1.0}, step)
    tracked.close()
    assert len(lines) == 1
    assert lines[0].startswith("--track tensorboard is given up, the run goes on: ")


def test_a_missing_tracker_is_one_line_before_anything_begins(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "wandb", ("a_package_that_nobody_has",))
    with pytest.raises(MissingExtraError, match="--track wandb needs a_package_that_nobody_has"):
        tracking.require_trackers(["wandb"])
    (tmp_path / "r.yaml").write_text(RECIPE)
    arguments = ("convert", teacher, "--recipe", tmp_path / "r.yaml", "--output", tmp_path / "run", "--track", "wandb")
    result = run(*arguments)
    assert result.exit_code == MissingExtraError.exit_code
    assert not (tmp_path / "run").exists()


def test_the_id_of_a_run_is_drawn_once(tmp_path):
    file = tmp_path / "tracking.json"
    assert tracking.tracking_id(file) == tracking.tracking_id(file)
    assert tracking.tracking_id(file) != tracking.tracking_id(tmp_path / "other.json")
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold the id"):
        tracking.tracking_id(file)


def test_nested_settings_become_dotted_names():
    assert tracking._flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None"}
