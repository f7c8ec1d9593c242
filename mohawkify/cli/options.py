"""Options that several commands share, the recipe that they name, and output."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mohawkify.errors import UsageError, printable

if TYPE_CHECKING:
    from mohawkify.planning.rules import Budget
    from mohawkify.recipe.schema import Recipe

FOLDER = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def recipe_names_beginning(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from mohawkify.recipe.bundled import recipe_names

    return [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]


recipe_option = click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="RECIPE",
    shell_complete=recipe_names_beginning,
    help="A bundled recipe (`mohawkify recipes ls`), or the path of a .yaml file.",
)
budget_recipe_option = click.option(
    "--recipe",
    "recipe_name",
    metavar="RECIPE",
    shell_complete=recipe_names_beginning,
    help="A bundled recipe (`mohawkify recipes ls`), or the path of a .yaml file; or else --tokens or --time.",
)


class Count(click.ParamType):
    """A count as recipes have it."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, or a refusal."""
        from mohawkify.recipe.types import parse_count

        try:
            number = parse_count(value)
        except ValueError:
            number = None
        if not isinstance(number, int) or number < 1:
            self.fail(f"{value!r} is not a count such as 300k.", param, ctx)
        return number


class Duration(click.ParamType):
    """A time in hours, minutes and seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds, or a refusal."""
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        if isinstance(value, str) and re.fullmatch(r"([0-9]{1,6}(\.[0-9]{1,3})?[dhms])+", value, re.ASCII):
            value = sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)([dhms])", value))
        if not isinstance(value, float) or value <= 0:
            self.fail(f"{value!r} is not a time such as 2h, 30m or 1h30m.", param, ctx)
        return value


tokens_option = click.option(
    "--tokens",
    type=Count(),
    metavar="COUNT",
    help="Instead of a recipe: have one written for so many tokens in all, such as 300k.",
)
time_option = click.option(
    "--time", "seconds", type=Duration(), metavar="TIME", help="Instead of tokens: so long in all, such as 2h or 30m."
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, such as stages.distill.tokens=5B. May be given again.",
)
processes_option = click.option(
    "--processes",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Start N processes on this machine, one for each GPU. Under torchrun and other launchers leave it out.",
)


class FiniteRange(click.FloatRange):
    """A number in a range; nan is in none, though click lets it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a refusal."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def chosen_recipe(name: str, overrides: tuple[str, ...]) -> Recipe:
    """The recipe that --recipe and --set mean."""
    from mohawkify.recipe.loading import apply_overrides, load_recipe

    return apply_overrides(load_recipe(name), overrides)


def recipe_or_budget(
    name: str | None, overrides: tuple[str, ...], tokens: int | None, seconds: float | None = None
) -> Recipe | Budget:
    """The recipe that --recipe and --set mean, or the budget that one is to be written for."""
    from mohawkify.planning.rules import Budget

    given = [option for option, value in (("--recipe", name), ("--tokens", tokens), ("--time", seconds)) if value]
    if len(given) != 1:
        raise UsageError(
            f"found {' and '.join(given) or 'none'}, expected exactly one of --recipe, --tokens and --time",
            hint="--tokens 300k has a recipe written; `mohawkify recipes ls` lists those that come along",
        )
    return Budget(tokens, seconds) if name is None else chosen_recipe(name, overrides)


def device_of(recipe: Recipe | Budget, overrides: tuple[str, ...]) -> str:
    """The ``compute.device`` that a recipe has, or that one that is to be written will have."""
    from mohawkify.planning.rules import Budget

    if not isinstance(recipe, Budget):
        return recipe.compute.device
    chosen = [text.partition("=")[2].strip() for text in overrides if text.startswith("compute.device=")]
    return chosen[-1] if chosen else "auto"


def own_text(data: str | None, validation: str | None) -> list[str]:
    """Overrides for text of the user's own; with it, the recipe's held-out text no longer fits."""
    sources: dict[str, list[dict[str, str]]] = {}
    if data is not None:
        sources = {"train": [{"path": data}], "validation": []}
    if validation is not None:
        sources["validation"] = [{"path": validation}]
    return [setting(f"data.{key}", value) for key, value in sources.items()]


_END = "...\n"  # what YAML puts behind a single value


def setting(key: str, value: Any) -> str:
    """A value as --set takes it: a path stays one value whatever signs are in it."""
    from mohawkify.recipe.strict_yaml import dump_yaml

    return f"{key}={dump_yaml(value).removesuffix(_END)}"


def print_line(line: str) -> None:
    """Print a line for people on standard error."""
    click.echo(printable(line), err=True)


def print_result(result: dict[str, Any], as_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Print a result on standard output."""
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else printable(as_text(result)))
