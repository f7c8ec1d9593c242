"""The errors a user can meet. Each says what was found, what was expected and what to do.

`mohawkify.cli` turns them into one clean line and an exit code; everything else that is raised is a bug.
"""

from __future__ import annotations


class MohawkifyError(Exception):
    """A foreseeable failure.

    Args:
        message: one line: what was found and what was expected.
        hint: one line: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MohawkifyError):
    """The command line asks for something that cannot be done as asked."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or an override breaks the schema."""


class TeacherError(MohawkifyError):
    """The teacher is missing, damaged, or not what it claims to be."""


class UnknownFamilyError(TeacherError):
    """No adapter knows the teacher's model type."""


class DataError(MohawkifyError):
    """Training or evaluation text is missing, empty or unreadable."""


class StorageError(MohawkifyError):
    """A file or folder could not be written, or is held by another process."""


class CheckpointError(MohawkifyError):
    """A checkpoint is damaged or belongs to another run."""


class NumericsError(MohawkifyError):
    """A loss or gradient is not finite, or a trained weight does not move."""


class ExportError(MohawkifyError):
    """An export could not be written, or does not agree with its run."""


class MissingExtraError(MohawkifyError):
    """An optional dependency is not installed.

    Args:
        package: the import that failed, for example ``mlx_lm``.
        extra: the extra of mohawkify that brings it, for example ``mlx``.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed", hint=f'pip install "mohawkify[{extra}]"')
