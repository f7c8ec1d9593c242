"""Everything that reaches the disk goes through here: whole files, whole folders and the run's log.

A file or folder appears under its name complete or not at all, whenever the process is killed or the power fails: it is
written beside its place as `.tmp-<name>-<pid>`, flushed to the disk, renamed, and the rename flushed too. Other modules
only write inside a temporary folder that `atomic_directory` hands them. What the operating system refuses becomes one
`StorageError` that names the path and the reason; so does what it refuses a library that writes inside that folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from mohawkify.errors import CheckpointError, StorageError
from mohawkify.files.disk import clear_errors, require_space
from mohawkify.files.manifest import (
    MANIFEST_NAME,
    Heartbeat,
    files_below,
    manifest_of,
    no_heartbeat,
    raise_error,
    read_manifest,
    require_listed_files,
    require_plain,
    sha256_of,
)
from mohawkify.files.strict_json import parse_json, render_json, spell_non_finite

_TEMPORARY_NAME = re.compile(r"\.tmp-(.+)-(\d{1,9})", re.DOTALL)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: afterwards it holds the new bytes, or after a failure still the old ones.

    Raises:
        StorageError: the file could not be written.
    """
    path = _absolute(path)
    temporary = _temporary_for(path)
    with clear_errors("write", path, len(data)):
        sweep_leftovers(path)
        try:
            _write_new_file(temporary, data)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a strict JSON file atomically, keys in the order given.

    Raises:
        NumericsError: the value holds a number that is not finite.
        StorageError: the file could not be written.
    """
    write_text(path, render_json(value, path))


def read_json(path: Path) -> Any:
    """Read a strict JSON file; raise `CheckpointError` if it is not: NaN, infinities and duplicate keys are refused."""
    with clear_errors("read", path):
        require_plain(path)
        data = path.read_bytes()
    return parse_json(data, str(path))


def file_sha256(path: Path) -> str:
    """Hash the content of a file: 64 hexadecimal digits."""
    with clear_errors("read", path):
        return sha256_of(path)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a log as a line of strict JSON, after dropping a torn last line.

    A number that is not finite is written as the string "nan", "inf" or "-inf", which `float()` reads back. The line is
    handed to the operating system but not forced to the disk: it outlives the process, but a power cut only once
    `flush_file` has been called.

    Raises:
        StorageError: the line could not be written; the log is as it was.
    """
    line = json.dumps(spell_non_finite(record), allow_nan=False).encode() + b"\n"
    with clear_errors("append to", path, len(line)), path.open("a+b", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def flush_file(path: Path) -> None:
    """Force a file and its name to the disk, so that they outlive a power cut.

    Raises:
        StorageError: the disk refuses.
    """
    with clear_errors("flush", path):
        _sync(path, os.O_RDONLY)
        _sync_directory(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a log written by `append_line`; a last line without its line end is torn and does not count.

    Returns:
        The records in order; none if the file does not exist yet.

    Raises:
        StorageError: the file cannot be read.
        CheckpointError: a line is not a JSON object.
    """
    with clear_errors("read", path):
        if not path.exists():
            return []
        require_plain(path)
        lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_json(line, f"{path}, line {number},")
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}, line {number}, is not a JSON object")
        records.append(record)
    return records


@contextmanager
def atomic_directory(
    target: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    manifest: bool = True,
    needed: int | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Iterator[Path]:
    """Write a folder that appears complete or not at all.

    The block writes into the temporary folder it is given. When it ends, the manifest is added, everything is flushed
    to the disk and the folder is renamed to the target. When it raises, the temporary folder is removed. What a killed
    process left of the same target is removed first.

    Args:
        target: the folder to create: it must not exist yet, or be empty. Missing parents are created.
        facts: of the manifest beside the files: any JSON object; read when the block ends.
        manifest: whether to write `manifest.json`, which `verify_directory` needs.
        needed: bytes that the block will write, if known: refused at once if the disk has less.
        heartbeat: called whenever a part of a file has been hashed, or a file flushed.

    Raises:
        DiskFullError: the disk has no room, or has none left.
        StorageError: the target is in use, or the folder could not be written.
    """
    target = _absolute(target)
    _require_utf8(target)
    temporary = _temporary_for(target)
    with clear_errors("write", target, needed):
        _require_vacant(target)
        sweep_leftovers(target)
        if needed is not None:
            require_space(target, needed)
        make_directory(target.parent)
        try:
            temporary.mkdir()
            yield temporary
            if manifest:
                _write_manifest(temporary, facts or {}, heartbeat)
            _sync_tree(temporary, heartbeat)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(target.parent)


def verify_directory(path: Path, heartbeat: Heartbeat = no_heartbeat) -> dict[str, Any]:
    """Hash every file of a folder again and compare with its manifest; `heartbeat` is called on the way.

    Returns:
        The manifest: "facts" as given to `atomic_directory`, "files" with the size and hash of each.

    Raises:
        CheckpointError: a file is missing, extra or changed, or the manifest is; the message names the first such file.
        UsageError: another version of mohawkify wrote the manifest.
    """
    try:
        with clear_errors("read", path):
            manifest = read_manifest(path / MANIFEST_NAME)
            require_listed_files(path, manifest["files"], heartbeat)
    except StorageError as error:  # for the caller a file that cannot be read is as bad as a changed one
        raise CheckpointError(error.message) from error
    return manifest


def remove_directory(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves a temporary folder to sweep, never half of this one."""
    path = _absolute(path)
    aside = _temporary_for(path)
    with clear_errors("remove", path):
        sweep_leftovers(path)
        os.rename(path, aside)
        _sync_directory(path.parent)
        shutil.rmtree(aside)


def sweep_temporaries(directory: Path, *, alone: bool = False) -> list[str]:
    """Remove what killed processes left half-written directly in a folder.

    Call it before anything is written: a temporary that carries this process's own number is then the work of a
    predecessor.

    Args:
        alone: whether this process alone writes there, as the holder of a lock does: then a temporary is left over even
            where its number now is that of a living process. Numbers are given out again, and in a container they
            repeat from start to start.

    Returns:
        The names removed.
    """
    removed = []
    with clear_errors("clean up", directory):
        for path in sorted(directory.glob(".tmp-*")):
            match = _TEMPORARY_NAME.fullmatch(path.name)
            if match is None or not (alone or is_dead(int(match[2]))):
                continue
            _remove_tree(path)
            removed.append(path.name)
    return removed


def sweep_leftovers(target: Path) -> None:
    """Remove what dead processes left of one file or folder beside its place, where other processes may write too."""
    with clear_errors("clean up beside", target):
        for path in target.parent.glob(".tmp-*"):
            match = _TEMPORARY_NAME.fullmatch(path.name)
            if match is None or match[1] != target.name or not is_dead(int(match[2])):
                continue
            # That of another user is not ours to remove, and another process may be sweeping too.
            with suppress(PermissionError, FileNotFoundError):
                _remove_tree(path)


def ensure_writable(directory: Path) -> None:
    """Create a folder if it is missing; raise unless a file can be written in it."""
    directory = _absolute(directory)
    _require_utf8(directory)
    place = directory / "probe"
    probe = _temporary_for(place)
    with clear_errors("write in", directory):
        make_directory(directory)
        sweep_leftovers(place)
        try:
            _write_new_file(probe, b"probe\n")
        finally:
            probe.unlink(missing_ok=True)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _require_utf8(path: Path) -> None:
    """Refuse a name that is no UTF-8 on the disk: the libraries that write weights take every name for that."""
    try:
        is_utf8 = os.fsencode(path) == str(path).encode()
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        raise StorageError(
            f"{str(path)!a} is no UTF-8 name, as libraries that write weights need it",
            hint="choose another folder; where the system's locale is not one of UTF-8, set PYTHONUTF8=1",
        )


def _temporary_for(path: Path) -> Path:
    """Name the place, in the same folder and so on the same file system, where a file or folder is prepared."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def is_dead(pid: int) -> bool:
    """Whether no other process has a number, so that what carries it is left over."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and belongs to another user
    return False


def _end_of_whole_lines(file: FileIO) -> int:
    """Find where the last complete line of a log ends, in bytes from its start."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.readall().rfind(b"\n") + 1


def _write_manifest(directory: Path, facts: Mapping[str, Any], heartbeat: Heartbeat = no_heartbeat) -> None:
    _write_new_file(directory / MANIFEST_NAME, manifest_of(directory, facts, heartbeat))


def _write_new_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _require_vacant(target: Path) -> None:
    hint = "choose another folder, or remove it"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StorageError(f"{target} is not a folder", hint=hint)
    if target.is_dir() and any(target.iterdir()):
        raise StorageError(f"{target} is not empty", hint=hint)


def make_directory(directory: Path) -> None:
    """Create a folder and its missing parents so that they outlive a power cut."""
    if directory.is_dir():
        return
    if directory.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    _sync_directory(directory.parent)


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path, heartbeat: Heartbeat) -> None:
    """Flush all files and folders to the disk, and give the files the permissions of the folder.

    The permissions because safetensors 0.8 creates files that only their owner can read (measured).
    """
    permissions = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for name in files_below(directory):
        handle = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fchmod(handle, permissions)
            os.fsync(handle)
        finally:
            os.close(handle)
        heartbeat()
    for folder, _, _ in os.walk(directory, topdown=False, onerror=raise_error):
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
