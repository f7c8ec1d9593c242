"""A run's log of steps, which a full disk does not stop: what it has no room for is written later, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mohawkify.errors import DiskFullError
from mohawkify.files import atomic


class MetricsLog:
    """The lines of `metrics.jsonl`.

    Args:
        report: receives a line where the disk has no room for the first of some lines.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._waiting: list[Mapping[str, Any]] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line, or keep it where the disk is full.

        Raises:
            StorageError: the system refuses for another reason.
        """
        self._waiting.append(record)
        try:
            self._write_waiting()
        except DiskFullError as error:
            if len(self._waiting) == 1:
                self._report(f"{error.message}; the lines are kept until the next checkpoint")

    def flush(self) -> None:
        """Write what was kept, and force all lines to the disk: a checkpoint must not outlive those of its steps.

        Raises:
            DiskFullError: there is still no room.
            StorageError: the system refuses for another reason.
        """
        self._write_waiting()
        atomic.flush_file(self._path)

    def _write_waiting(self) -> None:
        while self._waiting:
            atomic.append_line(self._path, self._waiting[0])
            del self._waiting[0]
