"""Faults for the tests of storage and checkpoints: something goes wrong at one chosen operation on the disk."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# Functions of `os`; `create`, `write` and `truncate` of Python's own files; `save_file`, which safetensors does itself.
OPERATIONS = (
    *("open", "mkdir", "rename", "replace", "link", "symlink", "fsync", "fchmod", "unlink", "rmdir"),
    *("ftruncate", "pwrite", "create", "write", "truncate", "save_file"),
)
_OF_FILES = ("create", "write", "truncate")

Function = Callable[..., Any]


class _File:
    """A file opened for writing, with some of its methods replaced."""

    def __init__(self, file: Any, methods: dict[str, Function]) -> None:
        self._file, self._methods = file, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


@contextmanager
def replaced(replace: Callable[[str, Function], Function], operations: tuple[str, ...] = OPERATIONS) -> Iterator[None]:
    """Put something else in the place of every operation that changes the disk.

    Args:
        replace: takes an operation's name and the real function, and gives the one to call instead.
        operations: which of `OPERATIONS`.
    """
    opened = io.open

    def open_file(*args: Any, **kwargs: Any) -> Any:
        mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
        if not set(mode) & set("wxa+"):
            return opened(*args, **kwargs)
        file = (replace("create", opened) if "create" in operations else opened)(*args, **kwargs)
        methods = {name: replace(name, getattr(file, name)) for name in ("write", "truncate") if name in operations}
        return _File(file, methods)

    with ExitStack() as stack:
        functions = {name: getattr(os, name) for name in operations if hasattr(os, name) and name not in _OF_FILES}
        functions.pop("truncate", None)
        if functions:
            stack.enter_context(mock.patch.multiple(os, **{n: replace(n, f) for n, f in functions.items()}))
        if set(operations) & set(_OF_FILES):
            stack.enter_context(mock.patch.object(io, "open", open_file))
        if "save_file" in operations and "safetensors.torch" in sys.modules:
            module = sys.modules["safetensors.torch"]
            stack.enter_context(mock.patch.object(module, "save_file", replace("save_file", module.save_file)))
        yield


@contextmanager
def fault_at(index: int, fault: Callable[[], None], operations: tuple[str, ...] = OPERATIONS) -> Iterator[list[str]]:
    """Call `fault` in place of the operation with this index, counted from 0; yield the names of those begun.

    A write is half done before the fault comes, and so is a file of safetensors.
    """
    begun: list[str] = []

    def counted(name: str, original: Function) -> Function:
        def operation(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) - 1 == index:
                if name == "write":
                    original(args[0][: len(args[0]) // 2])
                    file = getattr(original, "__self__", None)
                    if file is not None:
                        file.flush()
                if name == "save_file":
                    _save_half(*args, fault=fault)
                else:
                    fault()
            return original(*args, **kwargs)

        return operation

    with replaced(counted, operations):
        yield begun


def _save_half(tensors: Any, path: Any, *rest: Any, fault: Callable[[], None]) -> None:
    """Do what a failing safetensors leaves: half of a temporary file, and an error in its own words."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    data = save(tensors)
    Path(path).with_name(".tmpHalf").write_bytes(data[: len(data) // 2])
    try:
        fault()
    except OSError as error:
        Path(path).with_name(".tmpHalf").unlink()
        raise SafetensorError(
            f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        ) from None


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
