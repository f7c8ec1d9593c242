"""Inputs that change files of a folder: how they are written down, applied and undone."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Changes = Mapping[str, bytes | None]

_SYSTEM = ("/proc/mounts", "/proc/meminfo", "/proc/cpuinfo", "/dev/null")  # what libraries ask of their own accord

_opened: list[tuple[str, bool]] | None = None


def encode(changes: Changes, **facts: Any) -> bytes:
    """Write an input: each changed file with its new content, None for one that is gone; and facts of the case."""
    files = {name: None if data is None else base64.b64encode(data).decode() for name, data in changes.items()}
    return json.dumps({**facts, "files": files}).encode()


def decode(case: bytes) -> tuple[dict[str, bytes | None], dict[str, Any]]:
    """Read what `encode` wrote."""
    facts = json.loads(case)
    files = facts.pop("files")
    return {name: None if data is None else base64.b64decode(data) for name, data in files.items()}, facts


@contextmanager
def changed(folder: Path, original: Mapping[str, bytes], changes: Changes) -> Iterator[None]:
    """Change files of a folder, and bring it back afterwards."""
    for name, data in changes.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)
    try:
        yield
    finally:
        for name in changes:
            if name in original:
                (folder / name).write_bytes(original[name])
            else:
                (folder / name).unlink(missing_ok=True)


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is None or not isinstance(arguments[0] if arguments else None, str | bytes):
        return
    if event in ("open", "os.mkdir"):
        is_written = event == "os.mkdir" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        _opened.append((os.path.abspath(os.fsdecode(arguments[0])), is_written))


sys.addaudithook(_listen)


@contextmanager
def inside(folder: Path, only_written: bool = False) -> Iterator[None]:
    """Fail where the block opens a file outside a folder; what is installed does not count.

    Args:
        folder: where everything is.
        only_written: files that are only read may be anywhere.
    """
    global _opened
    _opened = []
    home = f"{folder.resolve()}{os.sep}"
    try:
        yield
    finally:
        opened, _opened = _opened, None
    for path, is_written in opened:
        if path in _SYSTEM or (only_written and not is_written):
            continue
        real = os.path.realpath(path)
        is_installed = real.startswith((sys.prefix, sys.base_prefix)) or real.endswith(".py") or ".egg-info" in real
        is_ours = f"{real}{os.sep}".startswith(home)
        assert is_ours or is_installed or real.endswith(".pyc"), f"opened {path}, outside the folder"
