"""The options of a conversion, apart from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mohawkify.train.tracking import PROJECT

Report = Callable[[str], None]


def ignore(line: str) -> None:
    """Drop a line."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs; the result does not depend on these.

    Args:
        output: the run's folder; None for ``runs/<student name>``.
        resume: ``auto`` continues a run of the same teacher and recipe; ``never`` requires a fresh folder.
        hang_timeout: seconds without progress after which the process ends with exit code 75; 0 for never.
        disk_wait: seconds to retry a checkpoint where the disk is full.
        prepared: folder in which `mohawkify data prepare` wrote tokenised text.
        track: names of the trackers that receive the metrics as well.
        track_project: the project in which trackers show the run.
        report: receives a line for every step of the way.
    """

    output: Path | None = None
    resume: str = "auto"
    hang_timeout: float = 0.0
    disk_wait: float = 0.0
    prepared: Path | None = None
    track: Sequence[str] = ()
    track_project: str = PROJECT
    report: Report = ignore
