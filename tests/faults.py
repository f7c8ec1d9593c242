"""Faults for the tests of storage and checkpoints: something goes wrong at one chosen operation on the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

OPERATIONS = ("open", "mkdir", "rename", "fsync", "fchmod", "unlink", "rmdir")


@contextmanager
def fault_at(index: int, fault: Callable[[], None], operations: tuple[str, ...] = OPERATIONS) -> Iterator[list[str]]:
    """Call `fault` in place of the operation with this index, counted from 0; yield the names of those begun."""
    begun: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) - 1 == index:
                fault()
            return original(*args, **kwargs)

        return operation

    with mock.patch.multiple(os, **{name: counted(name, getattr(os, name)) for name in operations}):
        yield begun


def killed_at(index: int, work: Callable[[], None]) -> bool:
    """Do the work in a forked process that SIGKILLs itself at one operation.

    Returns:
        True if it was killed, False if the work ended before that operation.
    """
    pid = os.fork()
    if pid == 0:
        try:
            with fault_at(index, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the work failed with exit code {code}"
    return code != 0


def raise_error(number: int) -> Callable[[], None]:
    """Build a fault that fails as the operating system would with this error number."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def content_of(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
