"""The errors a user can meet. Each names the found value, the expected one and the remedy.

`mohawkify.cli.main` turns them into one clean line and an exit code; everything else that is raised is a bug.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
import sys
from collections.abc import Iterable

# Exit codes: those of the shell (0, 2, 128 + signal), and from 64 on those of sysexits.h.
USAGE = 2
RECIPE = 64
NUMBERS = 65
INPUT = 66
MISSING = 69
BUG = 70
MEMORY = 71
EXPORT = 73
STORAGE = 74
HANG = 75
INTERRUPTED = 130
TERMINATED = 143

EXIT_CODES = {
    0: "done",
    USAGE: "it cannot be done as asked: arguments, a folder that is in use or holds something else",
    RECIPE: "the recipe or an override breaks the schema, or no family fits the teacher",
    NUMBERS: "a number is not finite, or a weight does not learn",
    INPUT: "a teacher, text, checkpoint or student is missing, damaged or not what it claims to be",
    MISSING: "an optional package is not installed",
    BUG: "something unforeseen: a bug, worth a report with the output of --debug",
    MEMORY: "out of memory, of the machine or of the device",
    EXPORT: "an export could not be made, or does not agree with its run",
    STORAGE: "a file could not be written: the disk is full, or the system refuses",
    HANG: "no progress for too long, with the stacks of all threads on standard error, or a process of several died",
    INTERRUPTED: "stopped by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
}


# Messages of torch where it has no class for the error: of a CPU, of other devices, and of the libraries on them.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|STATUS_ALLOC_FAILED|std::bad_alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or a CPU's, for which torch has no class of its own.

    torch's class for a device is recognised by its name, so that torch need not be imported here.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def require_docstrings() -> None:
    """Refuse `python -OO`: transformers builds its models from docstrings, and raises for any model without them."""
    if sys.flags.optimize > 1:
        raise UsageError(
            "Python runs with -OO, which drops the docstrings that transformers reads",
            hint="leave out -OO, and PYTHONOPTIMIZE=2; -O is fine",
        )


def cache_hint(error: BaseException) -> str | None:
    """The hint where a library could not use its cache, such as in a container whose home folder is read-only."""
    is_refused = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    return "set HF_HOME to a folder that can be written" if is_refused else None


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, such as tokenizers on a damaged file: this is no `Exception`.

    The class cannot be imported, so it is recognised by its name.
    """
    return type(error).__name__ == "PanicException"


class MohawkifyError(Exception):
    """A foreseeable failure.

    Args:
        message: one line: what was found and what was expected.
        hint: one line: what to do about it.
    """

    exit_code = BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MohawkifyError):
    """The command or its arguments cannot be carried out."""

    exit_code = USAGE


class RecipeError(UsageError):
    """A recipe or an override breaks the schema."""

    exit_code = RECIPE


class TeacherError(MohawkifyError):
    """The teacher is missing, damaged, or not what it claims to be."""

    exit_code = INPUT


class UnknownFamilyError(TeacherError):
    """There is no adapter for the teacher's model type."""

    exit_code = RECIPE


class DataError(MohawkifyError):
    """Training or evaluation text is missing, empty or unreadable."""

    exit_code = INPUT


class StorageError(MohawkifyError):
    """A file or folder could not be written, or is held by another process."""

    exit_code = STORAGE


class DiskFullError(StorageError):
    """The disk, the quota or the limit on a file's size is used up; nothing that was there before is lost."""


class CheckpointError(MohawkifyError):
    """A checkpoint is damaged or belongs to another run."""

    exit_code = INPUT


class NumericsError(MohawkifyError):
    """A loss or gradient is not finite, or a trained weight does not move."""

    exit_code = NUMBERS


class MemoryShortageError(MohawkifyError):
    """Memory ran out; the hint names settings that take less."""

    exit_code = MEMORY


class ProcessLostError(MohawkifyError):
    """Another process of the run ended without a word; nothing that was saved is lost."""

    exit_code = HANG


class ExportError(MohawkifyError):
    """An export could not be written, or does not agree with its run."""

    exit_code = EXPORT


class MissingExtraError(MohawkifyError):
    """An optional dependency is not installed.

    Args:
        package: the import that failed, for example ``mlx_lm``.
        extra: the extra of mohawkify that brings it, for example ``mlx``.
        purpose: what it is needed for.
    """

    exit_code = MISSING

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed", hint=f'pip install "mohawkify[{extra}]"')


def printable(text: str) -> str:
    """A text for a terminal: names come from strangers' files, and nothing in them may steer it. Lines stay lines."""
    return "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)


_JOINERS = "\u200c\u200d"  # between letters of Persian and the parts of an emoji


def harmless(text: str) -> str:
    """What a model wrote, for a terminal: control characters are shown as escapes and steer nothing."""
    return "".join(
        sign if sign.isprintable() or sign in f"\n\t{_JOINERS}" else sign.encode("unicode_escape").decode()
        for sign in text
    )


_LONGEST_NAME = 100  # Comparing names takes time that grows with their length, and names come from strangers' files.


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that a mistyped name most likely means, or None where none is close."""
    matches = difflib.get_close_matches(name[:_LONGEST_NAME], list(candidates), n=1)
    return matches[0] if matches else None


def did_you_mean(name: str, names: list[str]) -> str:
    """`` (did you mean NAME?)`` for a mistyped name that is close to one of `names`, else nothing."""
    guess = nearest(name, names)
    return f" (did you mean {guess}?)" if guess else ""


def quoted(name: str) -> str:
    """A name as messages show it: in quotes, and not too long."""
    return json.dumps(name[:_LONGEST_NAME])
