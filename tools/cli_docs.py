"""The list of all commands in docs/cli.md, written from the help of the commands themselves."""

from __future__ import annotations

import click

from mohawkify.cli.main import NAME, main
from tools.recipe_docs import replace_between

BEGIN = "<!-- From here to the end mark the page is written from the commands' help; `tools.cli_docs` renews it. -->"
END = "<!-- End of what is written from the commands' help. -->"
_WIDTH = 100


def cli_reference() -> str:
    """Write Markdown with the help of every command, as the terminal shows it at a fixed width."""
    return "\n".join(_sections(main, NAME, None))


def with_reference(page: str) -> str:
    """Returns a Markdown page with the part between its two marks written anew.

    Raises:
        ValueError: the page lacks a mark.
    """
    return replace_between(page, BEGIN, END, cli_reference())


def _sections(command: click.Command, name: str, parent: click.Context | None) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    context.terminal_width = context.max_content_width = _WIDTH
    lines = [f"## {context.command_path}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            lines += _sections(command.commands[each], each, context)
    return lines
