"""Metrics of a run for trackers: Accelerate's own classes for TensorBoard, Weights & Biases and Trackio.

A tracker that is not installed is refused before anything begins; one that fails later, because the network is gone or
its disk is full, is reported once and dropped.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mohawkify.errors import CheckpointError, MissingExtraError
from mohawkify.files import atomic

# Packages of which any one will do, by the tracker's name.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
PROJECT = "mohawkify"


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        MissingExtraError: names the first of them.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise MissingExtraError(TRACKERS[name][-1], name, f"--track {name}")


def tracking_id(file: Path) -> str:
    """The name of a run in trackers, drawn once and kept, so that a continued run is the same one.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not file.is_file():
        atomic.write_json(file, {"id": secrets.token_hex(4)})
    found = atomic.read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise CheckpointError(f"{file} does not hold the id of a tracked run", hint="remove it: a new id is drawn")
    return str(found["id"])


@dataclass(frozen=True)
class TrackedRun:
    """How trackers show a run.

    Args:
        project: groups runs.
        run_id: see `tracking_id`.
        name: of the run, for people.
        folder: where trackers keep files of their own.
        config: shown beside the metrics; a fresh run sends it once.
    """

    project: str
    run_id: str
    name: str
    folder: Path
    config: Mapping[str, Any]


class Tracking:
    """The trackers of a run.

    Args:
        trackers: keys of `TRACKERS`.
        step: optimizer steps taken so far.
        run: how the trackers show it.
        report: receives a line where a tracker fails.
    """

    def __init__(self, trackers: Sequence[str], step: int, run: TrackedRun, report: Callable[[str], None]) -> None:
        self.report = report
        self._trackers: dict[str, Any] = {}
        for name in trackers:
            with self._spared(name):
                tracker = _start(name, run, step)
                self._trackers[name] = tracker
                if step == 0 and run.config:
                    tracker.store_init_configuration(_flat(run.config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the metrics that are numbers."""
        numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)}
        for name, tracker in list(self._trackers.items()):
            with self._spared(name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close every tracker."""
        for name, tracker in list(self._trackers.items()):
            with self._spared(name):
                tracker.finish()
        self._trackers = {}

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Report any exception of a tracker once, drop the tracker, and let the run go on."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.report(f"--track {name} is given up, the run goes on: {reason}")


def _start(name: str, run: TrackedRun, step: int) -> Any:
    from accelerate import PartialState, tracking

    threads = torch.get_num_threads()
    PartialState()  # Accelerate's loggers need it
    torch.set_num_threads(threads)  # which it may have changed
    label = f"{run.name}-{run.run_id}"
    if name == "tensorboard":
        # Steps after the checkpoint are logged again, so their older points are purged. TensorBoard names files by the
        # second: without a suffix, a run continued within the same second would overwrite its beginning.
        tracker: Any = tracking.TensorBoardTracker(
            label, logging_dir=run.folder / name, purge_step=step + 1, filename_suffix=f".after-{step}"
        )
    elif name == "wandb":
        tracker = tracking.WandBTracker(run.project, id=run.run_id, name=label, resume="allow", dir=str(run.folder))
    else:
        tracker = tracking.TrackioTracker(run.project, name=label, resume="allow")
    tracker.start()
    return tracker


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if type(value) in (bool, int, float, str) else str(value)
    return flat
