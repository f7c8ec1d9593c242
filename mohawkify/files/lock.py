"""One process works in a folder; the lock is the kernel's, so that none outlives its process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mohawkify.errors import UsageError
from mohawkify.files.atomic import is_dead, make_directory
from mohawkify.files.disk import clear_errors

LOCK_NAME = ".lock"
POLLS, POLL_SECONDS = 50, 0.02


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the kernel frees it when the process ends, however it ends.

    Raises:
        UsageError: another process holds the folder.
        StorageError: the lock file could not be created or locked.
    """
    handle = _take_lock(directory)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it with a forked child that is still alive
        os.close(handle)


def _take_lock(directory: Path) -> int:
    """Lock a folder and write this process number into the lock file, for the messages of others."""
    with clear_errors("lock", directory):
        handle = _lock_file(directory)
        while not _is_named(handle, directory / LOCK_NAME):  # its holder removed the folder in the meantime
            os.close(handle)
            handle = _lock_file(directory)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, b"%d\n" % os.getpid(), 0)
        except BaseException:
            os.close(handle)
            raise
    return handle


def _lock_file(directory: Path) -> int:
    make_directory(directory)
    handle = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(handle)
        os.close(handle)
        raise UsageError(
            f"another process (pid {holder}) is working in {directory}",
            hint="wait for it to end, or choose another output folder",
        ) from error
    except BaseException:
        os.close(handle)
        raise
    return handle


def _holder(handle: int) -> str:
    """The process number in a lock file, which its holder writes just after it has locked the file."""
    for _ in range(POLLS):
        text = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        if text.isdecimal() and (int(text) == os.getpid() or not is_dead(int(text))):
            return text
        time.sleep(POLL_SECONDS)
    return "unknown"


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
