"""The commands about recipes: those that come along, and written ones."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mohawkify.cli import tables
from mohawkify.cli.error_lines import CommandGroup
from mohawkify.cli.options import (
    FOLDER,
    Count,
    as_json,
    own_text,
    print_result,
    recipe_names_beginning,
    set_option,
)
from mohawkify.cli.quiet import quiet_libraries
from mohawkify.cli.short_imports import paused_collector
from mohawkify.errors import UsageError


@click.group(cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """The recipes that come along, and written ones: ls, show, cp, write."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@recipes.command("ls")
@as_json
def recipes_ls(as_json: bool) -> None:
    """List the bundled recipes."""
    from mohawkify.recipe.bundled import recipe_names
    from mohawkify.recipe.loading import load_recipe

    found = [
        {"name": name, "description": load_recipe(name).description, "teacher": load_recipe(name).teacher}
        for name in recipe_names()
    ]
    print_result({"recipes": found}, tables.recipes_text, as_json)


@recipes.command("show")
@click.argument("name", shell_complete=recipe_names_beginning)
def recipes_show(name: str) -> None:
    """Print a bundled recipe."""
    from mohawkify.recipe.bundled import recipe_text

    click.echo(recipe_text(name), nl=False)


@recipes.command("write")
@click.argument("teacher")
@click.option("--tokens", type=Count(), required=True, metavar="COUNT", help="Of all stages together, such as 300k.")
@set_option
@click.option("--data", metavar="PATH", help="Train on this file, folder or glob; by default on text of the web.")
@click.option("--gpu", metavar="NAME", help="Write it for H100, H200, A100 or 4090; by default for this machine.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
def recipes_write(
    teacher: str, tokens: int, overrides: tuple[str, ...], data: str | None, gpu: str | None, gpus: int
) -> None:
    """Print the recipe that convert --tokens would write.

    No weights are loaded; TEACHER may be a config.json.
    """
    with paused_collector(), quiet_libraries():
        from mohawkify import api
        from mohawkify.recipe.loading import dump_recipe

        options = api.PlanOptions(gpu=gpu, num_gpus=gpus)
        written = api.write_recipe(teacher, api.Budget(tokens), (*own_text(data, None), *overrides), options)
    click.echo(dump_recipe(written), nl=False)


@recipes.command("cp")
@click.argument("name", shell_complete=recipe_names_beginning)
@click.argument("file", type=FOLDER)
def recipes_cp(name: str, file: Path) -> None:
    """Copy a bundled recipe to FILE, to make it your own; an existing file is never replaced."""
    from mohawkify.files.atomic import write_text
    from mohawkify.recipe.bundled import recipe_text

    text = recipe_text(name)
    if os.path.isdir(file):  # Path.is_dir raises for a name that is too long
        file = file / f"{name}.yaml"
    if file.exists() or file.is_symlink():
        raise UsageError(f"{file} exists already", hint="choose another name")
    write_text(file, text)
    click.echo(str(file))
