"""The manifest of a folder: the size and sha256 of each file, and a hash of itself.

Nothing is written here, and errors of the operating system are raised as they are: `atomic` writes, and finds words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mohawkify.errors import CheckpointError, NumericsError, UsageError
from mohawkify.files.strict_json import parse_json, render_json

MANIFEST_NAME = "manifest.json"
Heartbeat = Callable[[], None]

_FORMAT = "mohawkify-manifest"
_VERSION = 1
_PART_BYTES = 1 << 20


def no_heartbeat() -> None:
    """Do nothing: no watchdog is running."""


def sha256_of(path: Path, heartbeat: Heartbeat = no_heartbeat) -> str:
    """Hash the content of a file: 64 hexadecimal digits; `heartbeat` is called after every part of it."""
    digest = hashlib.sha256()
    try:
        require_plain(path)
        with path.open("rb") as file:
            while part := file.read(_PART_BYTES):
                digest.update(part)
                heartbeat()
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of reading, unlike that of opening, lacks the path
        raise
    return digest.hexdigest()


def require_plain(path: Path) -> None:
    """Refuse what is no file with an end: reading a pipe or a device could take for ever.

    Raises:
        OSError: there is nothing, or it is not a plain file or a link to one.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))


def manifest_of(directory: Path, facts: Mapping[str, Any], heartbeat: Heartbeat) -> bytes:
    """The manifest of a folder as it is now.

    Args:
        heartbeat: called after every part of a file.
    """
    files = {name: _describe(directory / name, heartbeat) for name in sorted(files_below(directory))}
    body = {"format": _FORMAT, "version": _VERSION, "facts": dict(facts), "files": files}
    return sealed(body, directory / MANIFEST_NAME)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        CheckpointError: it is none, or it was changed.
        UsageError: another version of mohawkify wrote it.
    """
    data = path.read_bytes()
    manifest = parse_json(data, str(path))
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a manifest of mohawkify")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    try:
        # Comparing the text, not the values, finds a changed space as well.
        is_sealed = sealed(body, path) == data
    except NumericsError:  # it holds what is never written, such as nesting without end
        is_sealed = False
    if not is_sealed:
        raise CheckpointError(f"{path} has changed: it does not carry its own hash")
    if manifest.get("version") != _VERSION:
        raise UsageError(
            f"{path} has version {manifest.get('version')}, this mohawkify reads version {_VERSION}",
            hint="use the version of mohawkify that wrote it",
        )
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("facts"), dict):
        raise CheckpointError(f"{path} lists no files or no facts")
    return manifest


def require_listed_files(directory: Path, listed: dict[str, Any], heartbeat: Heartbeat) -> None:
    """Raise CheckpointError for the first file that is missing, extra or changed."""
    present = files_below(directory) - {MANIFEST_NAME}
    for name in sorted(listed.keys() ^ present):
        problem = "is not in the manifest" if name in present else "is missing"
        raise CheckpointError(f"{directory / name} {problem}")
    for name in sorted(listed):
        found = _describe(directory / name, heartbeat)
        if found != listed[name]:
            content = f"{found['bytes']:,} bytes with sha256 {found['sha256'][:12]}..."
            raise CheckpointError(f"{directory / name} has changed: it now holds {content}")


def files_below(directory: Path) -> set[str]:
    """Name all that is not a folder, relative to the top; a link is never followed."""
    names: set[str] = set()
    for folder, folders, files in os.walk(directory, onerror=raise_error):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        names.update((Path(folder) / name).relative_to(directory).as_posix() for name in files + links)
    return names


def raise_error(error: OSError) -> None:
    """Raise what `os.walk` would pass over."""
    raise error


def sealed(body: dict[str, Any], path: Path) -> bytes:
    """Render a manifest with the hash of its own text, so that a change to the manifest shows too."""
    seal = hashlib.sha256(render_json(body, path).encode()).hexdigest()
    return render_json({**body, "sha256": seal}, path).encode()


def _describe(path: Path, heartbeat: Heartbeat) -> dict[str, Any]:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return {"bytes": status.st_size, "sha256": sha256_of(path, heartbeat)}
