"""The command chat: lines of a user, answers of a student, and a few commands between them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from mohawkify.cli.error_lines import print_error
from mohawkify.cli.options import FOLDER, FiniteRange, print_line
from mohawkify.cli.quiet import quiet_libraries
from mohawkify.errors import MohawkifyError, UsageError, harmless

if TYPE_CHECKING:
    from mohawkify.evaluation.dialogue import Dialogue

PROMPT = "> "
HELP = """\
/reset       forget the conversation, but not the system prompt
/save FILE   keep the conversation and its state in a new file: `mohawkify chat --load-state FILE` goes on with it
/help        this list
/quit        the end, as Ctrl-D is; Ctrl-C ends an answer
//...        a message that begins with /"""


@click.command()
@click.argument("run", required=False, type=FOLDER)
@click.option("--system", metavar="TEXT", help="Instructions in front of the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="The most per answer.")
@click.option(
    "--temperature", type=FiniteRange(min=0), default=0.0, show_default=True, help="0: always the most probable token."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the sampling.")
@click.option("--load-state", type=FOLDER, metavar="FILE", help="Go on with a conversation that `/save` kept.")
def chat(run: Path | None, system: str | None, **options: Any) -> None:
    """Talk with a run's student.

    The teacher's chat template is put around every message; a turn reads what is new alone, since the state is kept.
    Lines that begin with / are commands: /help lists them. Without a terminal, every line of standard input is a
    message.
    """
    with quiet_libraries() as output:
        from mohawkify import api

        dialogue = api.chat(run, api.GenerateOptions(**options), system)
        is_terminal = sys.stdin.isatty() and output.isatty()
        if is_terminal:
            print_line("/help lists commands, /quit ends")
        for line in _lines(output, is_terminal):
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if _command(dialogue, line):
                        return
                elif line:
                    _answer(dialogue, line.replace("//", "/", 1) if line.startswith("//") else line, output)
            except MohawkifyError as error:
                print_error(error.message, error.hint)


def _lines(output: TextIO, is_terminal: bool) -> Iterator[str]:
    """The lines of a user, to the end."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  edits lines and keeps those before
    while True:
        try:
            with redirect_stdout(output):
                yield input(PROMPT).strip()
        except EOFError:
            click.echo(file=output)
            return


def _command(dialogue: Dialogue, line: str) -> bool:
    """Carry out a command; True ends the chat."""
    name, _, rest = line.partition(" ")
    match name, rest.strip():
        case "/quit", "":
            return True
        case "/help", "":
            print_line(HELP)
        case "/reset", "":
            dialogue.reset()
            print_line("forgotten")
        case "/save", "":
            raise UsageError("found no name, expected /save FILE")
        case "/save", file:
            dialogue.save(Path(file).expanduser())
            print_line(f"saved to {file}")
        case _:
            raise UsageError(f"found {line}, expected /reset, /save FILE, /help or /quit")
    return False


def _answer(dialogue: Dialogue, text: str, output: TextIO) -> None:
    def show(piece: str) -> None:
        click.echo(harmless(piece), file=output, nl=False)

    with _stoppable() as is_stopped:
        dialogue.reply(text, show, is_stopped)
    click.echo(file=output)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end an answer; a second one ends the command.

    Not by an exception, which could end a token between two layers and leave the state half moved on.
    """
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(stopped)
    finally:
        signal.signal(signal.SIGINT, before)
