"""The command import."""

from __future__ import annotations

from pathlib import Path

import click

from mohawkify.cli.options import FOLDER, chosen_recipe, print_line, recipe_names_beginning, set_option
from mohawkify.cli.quiet import quiet_libraries


@click.command("import")
@click.argument("checkpoint")
@click.option("--output", type=FOLDER, metavar="DIR", help="The run's folder; by default one below runs/.")
@click.option("--teacher", metavar="TEACHER", help="The model it was made from: its tokenizer, and to compare with.")
@click.option(
    "--recipe",
    "recipe_name",
    default="llamba-1b",
    show_default=True,
    metavar="RECIPE",
    shell_complete=recipe_names_beginning,
    help="What the run records, with the text that eval measures on.",
)
@set_option
def import_checkpoint(
    checkpoint: str, output: Path | None, teacher: str | None, recipe_name: str, overrides: tuple[str, ...]
) -> None:
    """Make a run of a Llamba checkpoint.

    CHECKPOINT is a folder or a model on the Hub in the layout of the released Llamba models. Prints the run's folder,
    which eval, export, generate, chat and serve take as one that convert wrote.
    """
    recipe = chosen_recipe(recipe_name, overrides)
    with quiet_libraries():
        from mohawkify import api

        run = api.import_checkpoint(checkpoint, api.ImportOptions(recipe, output, teacher), print_line)
    click.echo(str(run.path))
