"""A full disk costs the log no line and no order; anything else that the system refuses is said at once."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mohawkify.errors import DiskFullError, StorageError
from mohawkify.files.atomic import read_lines
from mohawkify.run.metrics import MetricsLog
from tests.files.faults import fault_at, raise_error


def refused(number: int) -> AbstractContextManager[list[str]]:
    """The system refuses the next write."""
    return fault_at(0, raise_error(number), ("write",))


def test_lines_that_the_disk_has_no_room_for_come_later_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path / "log", said.append)
    log.append({"step": 1})
    for step in (2, 3):
        with refused(errno.ENOSPC):
            log.append({"step": step})
    assert read_lines(tmp_path / "log") == [{"step": 1}]
    assert len(said) == 1
    assert "bytes are needed" in said[0]
    log.append({"step": 4})
    assert read_lines(tmp_path / "log") == [{"step": step} for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_checkpoint_waits_for_the_lines(tmp_path: Path, number: int) -> None:
    log = MetricsLog(tmp_path / "log", lambda line: None)
    with refused(number):
        log.append({"step": 1})
    with refused(number), pytest.raises(DiskFullError, match=r"cannot append to .*log"):
        log.flush()
    log.flush()
    assert read_lines(tmp_path / "log") == [{"step": 1}]


def test_another_error_is_raised(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "log", lambda line: pytest.fail(line))
    with refused(errno.EIO), pytest.raises(StorageError, match="Input/output error"):
        log.append({"step": 1})


def test_flushing_reaches_the_file_and_its_name(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "log", lambda line: None)
    log.append({"step": 1})
    with fault_at(-1, lambda: None, ("open", "fsync")) as begun:
        log.flush()
    assert begun == ["open", "fsync", "open", "fsync"]
