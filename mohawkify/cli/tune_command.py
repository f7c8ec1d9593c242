"""The command tune: the learning rates of a conversion, found before it trains."""

from __future__ import annotations

from pathlib import Path

import click

from mohawkify.cli import tables
from mohawkify.cli.data_commands import prepared_option
from mohawkify.cli.options import (
    FOLDER,
    as_json,
    budget_recipe_option,
    device_of,
    own_text,
    print_line,
    print_result,
    processes_option,
    recipe_or_budget,
    set_option,
    tokens_option,
)
from mohawkify.cli.quiet import quiet_libraries

TUNED_TOKENS = 300_000  # the budget where none is named


@click.command()
@click.argument("teacher")
@budget_recipe_option
@tokens_option
@set_option
@click.option("--data", metavar="PATH", help="Tune on this file, folder or glob instead of the recipe's text.")
@click.option("--output", type=FOLDER, metavar="DIR", help="The run's folder; by default runs/ and the student's name.")
@prepared_option
@processes_option
@as_json
def tune(
    teacher: str,
    recipe_name: str | None,
    tokens: int | None,
    overrides: tuple[str, ...],
    data: str | None,
    output: Path | None,
    prepared: Path,
    processes: int | None,
    as_json: bool,
) -> None:
    """Find the learning rates of a conversion.

    The mixers are calibrated if the recipe says so; then every stage that trains takes a few steps at each of several
    learning rates, always from the same weights. Nothing else is learned: a convert into the same folder goes on from
    there, and where the recipe has learning_rate: auto it takes the rate found for its first stage. The folder holds
    tuning.json and a picture of each range test. Without --recipe and --tokens the recipe is that of 300k tokens.
    """
    settings = (*own_text(data, None), *overrides)
    recipe = recipe_or_budget(recipe_name, settings, tokens if recipe_name else tokens or TUNED_TOKENS)
    with quiet_libraries():
        from mohawkify.cli.ranks import joined, start_processes

        start_processes(processes)
        with joined(device_of(recipe, settings)) as world:
            from mohawkify import api

            options = api.ConvertOptions(output=output, prepared=prepared, report=print_line)
            found = api.tune(teacher, recipe, () if recipe_name else settings, options=options, world=world)
    if world.is_rank0:
        print_result(found, tables.tuning_text, as_json)
