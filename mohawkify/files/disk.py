"""Free space on the disk, and the system's errors in one line: the operation, the path, the reason, the space."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mohawkify.errors import DiskFullError, MohawkifyError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder on another disk",
    errno.EFBIG: "the limit on the size of a file is reached: see `ulimit -f`",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
}
# Libraries that are not written in Python give the system's number in words, or not at all.
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers
_MLX = re.compile(r"\[write\] Unable to write|\[save_safetensors\] Failed to open")


def free_bytes(directory: Path) -> int:
    """The bytes that this user may still write in a folder, which need not exist yet."""
    directory = Path(os.path.abspath(directory))
    with clear_errors("look at", directory):
        while not directory.exists():
            directory = directory.parent
        return shutil.disk_usage(directory).free


def require_space(directory: Path, needed: int) -> None:
    """Refuse to begin writing `needed` bytes that the disk cannot hold.

    Raises:
        DiskFullError: fewer are free.
    """
    free = free_bytes(directory)
    if free < needed:
        raise DiskFullError(f"{directory} needs {needed:,} bytes, {free:,} are free", hint=_HINTS[errno.ENOSPC])


@contextmanager
def clear_errors(action: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the operating system into one line, whether Python raises it or a library.

    Args:
        action: what the block does, as in "cannot write".
        needed: bytes that it writes in all, if known: named where the disk is full.

    Raises:
        DiskFullError: the disk or the quota is full.
        StorageError: the system refuses for another reason.
    """
    try:
        yield
    except MohawkifyError:
        raise
    except OSError as error:
        if error.errno is None:  # not from the operating system: some libraries derive their own errors from OSError
            raise
        reason = error.strerror or str(error)
        if error.filename is not None and str(error.filename) != str(path):
            reason = f"{reason} ({error.filename})"
        raise _refusal(f"cannot {action} {path}: {reason}", error.errno, path, needed) from error
    except Exception as error:
        number = _number_in_words(error)
        if number is not None:
            raise _refusal(f"cannot {action} {path}: {os.strerror(number)}", number, path, needed) from error
        if not isinstance(error, RuntimeError) or not _MLX.match(str(error)):
            raise
        raise StorageError(
            f"cannot {action} {path}: {error}{_space(path, needed)}",
            hint="is the disk full, or the limit on the size of a file reached (`ulimit -f`)?",
        ) from error


def _number_in_words(error: Exception) -> int | None:
    """The errno that safetensors, or tokenizers with its bare Exception, has in its message.

    The class of safetensors is recognised by its name, so that it need not be imported here.
    """
    found = _RUST.search(str(error)) if type(error) is Exception or type(error).__name__ == "SafetensorError" else None
    return None if found is None else int(found[1])


def _refusal(message: str, number: int, path: Path, needed: int | None) -> StorageError:
    if number in _FULL:
        return DiskFullError(message + _space(path, needed), hint=_HINTS[number])
    return StorageError(message, hint=_HINTS.get(number))


def _space(path: Path, needed: int | None) -> str:
    """The needed and the free bytes of the disk of a file, as far as they are known, for a message."""
    with suppress(OSError, StorageError):
        free = f"{free_bytes(path.parent):,}"
        return f"; {free} bytes are free" if needed is None else f"; {needed:,} bytes are needed, {free} are free"
    return ""
