"""The command score: which layers and heads a hybrid should keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mohawkify.cli.options import print_line, print_result, recipe_option, set_option
from mohawkify.cli.quiet import quiet_libraries


@click.command()
@click.argument("teacher")
@recipe_option
@set_option
@click.option(
    "--layers", default="25%", show_default=True, metavar="N|SHARE", help="How many layers are chosen; 0 for none."
)
@click.option("--heads", default="5%", show_default=True, metavar="SHARE", help="How many heads likewise.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for scores.json, scores.svg and scores.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def score(
    teacher: str, recipe_name: str, overrides: tuple[str, ...], layers: str, heads: str, output: Path, as_json: bool
) -> None:
    """Score layers and heads by what their attention saves.

    TEACHER becomes a student from the recipe's calibration alone; its held-out text shows how much nearer to the
    teacher it is with the attention of a layer or head given back. The same command goes on where it was stopped.
    Recipes read the file: student.keep: {layers: auto, number: 2, scores: DIR/scores.json}.
    """
    wanted: dict[str, Any] = {
        "layers": None if layers == "0" else int(layers) if layers.isdecimal() else layers,
        "heads": None if heads in ("0", "0%") else heads,
    }
    with quiet_libraries():
        from mohawkify import api
        from mohawkify.analysis.scoring import table_of

        options = api.ConvertOptions(output=output, report=print_line)
        found = api.score(teacher, recipe_name, overrides, **wanted, options=options)
    print_result(found, table_of, as_json)
