"""The end of a command: one clean line per error, a hint, an exit code; the traceback only with ``--debug``."""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import click

from mohawkify.errors import (
    BUG,
    INTERRUPTED,
    MEMORY,
    TERMINATED,
    USAGE,
    MohawkifyError,
    UsageError,
    is_out_of_memory,
    is_panic,
    printable,
)

LAUNCHED = "MOHAWKIFY_LAUNCHED"  # in the environment of processes that --processes has started
DEBUG_FLAG = "--debug"
_LONGEST_LINE = 600
# Errors of paths that the system does not look up, such as names that are too long.
_REFUSED_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_UTF8_HINT = "set PYTHONUTF8=1, or LC_ALL to a locale with UTF-8; convert what is in another encoding"


class CommandGroup(click.Group):
    """A group that lists its commands in the order of the file, and reports every error in the same way."""

    group_class = type  # click: groups inside are of this class too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the file."""
        return list(self.commands)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command; ``--debug`` may stand before it and after it."""
        if not isinstance(cmd, CommandGroup):
            cmd.params.append(debug_option())
        super().add_command(cmd, name)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and end the process with its exit code.

        The root context's ``obj`` has the arguments, which are handed on to processes that the command starts.
        """
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        _end_cleanly_on_sigterm()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a model writes signs that a Latin-1 terminal lacks
        try:
            _require_text(arguments)
            code = super().main(arguments, prog_name, complete_var, standalone_mode=False, obj=arguments, **extra)
        except BaseException as error:
            if not isinstance(error, (Exception, KeyboardInterrupt)) and not is_panic(error):
                raise
            if DEBUG_FLAG in arguments:
                traceback.print_exception(error, file=sys.stderr)
            sys.exit(report_error(error))
        code = code if isinstance(code, int) else 0
        if args is None:
            end_at_once(code)
        sys.exit(code)


def _require_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are no text in the system's encoding: Python hands them on as halves of surrogate pairs."""
    for argument in arguments:
        if any("\ud800" <= sign <= "\udfff" for sign in argument):
            raise UsageError(
                f"found {os.fsencode(argument)!r} on the command line, which is no {sys.getfilesystemencoding()} text",
                hint=_UTF8_HINT,
            )


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C, with an exit code of its own."""


def _end_cleanly_on_sigterm() -> None:
    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
        raise Terminated

    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and LAUNCHED in os.environ:
        # Until the processes of a run are connected, the process that started them reports for all.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    elif is_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)


def end_at_once(code: int) -> None:
    """End the process without Python's shutdown, which takes a second once torch and transformers are imported.

    In it threads of torch's gloo may also abort the process: see pytorch/pytorch#190489; observed once in hundreds of
    runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def debug_option() -> click.Option:
    """The option behind ``--debug``; the command line itself is searched for it, since parsing can fail too."""
    return click.Option([DEBUG_FLAG], is_flag=True, expose_value=False, help="Show the traceback of an error.")


def report_error(error: BaseException) -> int:
    """Write an error to standard error as one line and a hint.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    message, hint, code = describe(error)
    print_error(message, hint)
    return code


def describe(error: BaseException) -> tuple[str, str | None, int]:
    """The message, hint and exit code of an error."""
    if isinstance(error, MohawkifyError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "mohawkify"
        return error.format_message(), f"`{command} --help` lists what it takes", USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), None, error.exit_code
    # click turns whatever a KeyboardInterrupt is into an Abort.
    if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated):
        return "terminated", None, TERMINATED
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted", None, INTERRUPTED
    if is_out_of_memory(error):
        hint = "use a smaller compute.micro_batch_sequences or a shorter sequence_length"
        return f"out of memory: {error}", hint, MEMORY
    if isinstance(error, OSError) and error.errno in _REFUSED_PATHS:
        return f"{error.strerror}: {error.filename}", "check the paths on the command line and in the recipe", USAGE
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        sign = error.object[error.start]
        return f"this system's encoding, {error.encoding}, has no sign {sign!r}", _UTF8_HINT, USAGE
    return f"unexpected {type(error).__name__}: {error}", "run it again with --debug for the traceback", BUG


def print_error(message: str, hint: str | None) -> None:
    """Write an error's line and its hint to standard error."""
    lines = [f"error: {_one_line(message)}", *([f"hint: {_one_line(hint)}"] if hint else [])]
    click.echo("\n".join(lines), err=True)  # in one piece, as other processes may write too


def _one_line(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
