"""The commands for text: tokenise it ahead of a conversion, and show tokenised text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mohawkify.cli.error_lines import CommandGroup
from mohawkify.cli.options import (
    FOLDER,
    as_json,
    chosen_recipe,
    print_line,
    print_result,
    recipe_option,
    set_option,
)
from mohawkify.cli.quiet import quiet_libraries
from mohawkify.cli.tables import short_bytes, short_time
from mohawkify.text_tables import text_table

PREPARED = Path("prepared")

prepared_option = click.option(
    "--prepared",
    type=FOLDER,
    default=PREPARED,
    show_default=True,
    metavar="DIR",
    help="Use tokenised text that `mohawkify data prepare` put here, if it is the recipe's.",
)


@click.group(cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def data(context: click.Context) -> None:
    """Text: tokenise it ahead, show it."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@data.command()
@click.argument("teacher")
@recipe_option
@set_option
@click.option(
    "--output",
    type=FOLDER,
    default=PREPARED,
    show_default=True,
    metavar="DIR",
    help="Where tokenised text is put, each corpus in a folder of its own.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    default=0,
    show_default=True,
    help="Processes that tokenise; the result is the same for any number.",
)
@as_json
def prepare(
    teacher: str, recipe_name: str, overrides: tuple[str, ...], output: Path, workers: int, as_json: bool
) -> None:
    """Tokenise a recipe's text ahead of a conversion.

    No weights are loaded. Stopped or killed, the same command goes on behind the last finished shard. A conversion with
    the same teacher, text and token budgets uses the result where it lies.
    """
    recipe = chosen_recipe(recipe_name, overrides)
    with quiet_libraries():
        from mohawkify.data.prepare_text import prepare_text

        found = prepare_text(teacher, recipe, output, num_workers=workers, report=print_line)
    print_result(found, _prepared_text, as_json)


@data.command("inspect")
@click.argument("folder", type=FOLDER)
@click.option(
    "--teacher", metavar="TEACHER", help="Whose tokenizer it is; by default that of the folder it was made with."
)
@click.option(
    "--documents", type=click.IntRange(0, 1000), default=3, show_default=True, help="How many documents to show."
)
@as_json
def inspect_data(folder: Path, teacher: str | None, documents: int, as_json: bool) -> None:
    """Show what tokenised text holds.

    FOLDER is what `mohawkify data prepare` wrote, one corpus of it, or a run. Counts, sources, and the beginnings of
    documents spread over the text; where only completions count, they stand between the marks ⟦ and ⟧.
    """
    with quiet_libraries():
        from mohawkify.data.prepare_text import inspect_text

        found = inspect_text(folder, teacher, documents)
    print_result(found, _corpora_text, as_json)


def _prepared_text(found: dict[str, Any]) -> str:
    lines = [_corpora_table(found["corpora"]), ""]
    return "\n".join([*lines, f"in {found['directory']}, after {short_time(found['seconds'])}"])


def _corpora_text(found: dict[str, Any]) -> str:
    lines = [_corpora_table(found["corpora"])]
    for name, facts in found["corpora"].items():
        lines += ["", f"{name}: fingerprint {facts['fingerprint'][:16]}, tokenised for {facts['teacher']}"]
        for entry in facts["sources"]:
            lines.append(
                f"  {entry['source']}: {entry['documents']:,} documents of {entry['rows']:,} rows,"
                f" {entry['tokens']:,} tokens ({entry['tokens'] / facts['tokens']:.1%})"
            )
            if entry.get("bad_rows"):
                lines.append(f"    bad rows passed over: {entry['bad_rows']:,}; the first: {entry['first_error']}")
        for shown in facts["shown"]:
            text = "(without its tokenizer)" if shown["text"] is None else repr(shown["text"])
            lines.append(f"  document {shown['document']:,}, {shown['tokens']:,} tokens: {text}")
    return "\n".join(lines)


def _corpora_table(corpora: dict[str, Any]) -> str:
    rows = []
    for name, facts in corpora.items():
        completions = facts["completion_tokens"]
        counted = "all" if completions is None else f"{completions:,}"
        size = short_bytes(facts["bytes"])
        rows.append([name, f"{facts['tokens']:,}", f"{facts['documents']:,}", counted, str(len(facts["shards"])), size])
    return text_table(["text", "tokens", "documents", "completions", "shards", "size"], rows)
