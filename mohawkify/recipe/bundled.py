"""The recipes that come along, in `recipes/`, found by listing."""

from __future__ import annotations

from importlib import resources

from mohawkify.errors import RecipeError, did_you_mean, quoted
from mohawkify.files.listing import stems_in

_PACKAGE = "mohawkify.recipes"


def recipe_names() -> list[str]:
    """Lists the bundled recipes by name, sorted."""
    return stems_in(_PACKAGE, ".yaml")


def recipe_text(name: str) -> str:
    """Returns the YAML text of a bundled recipe.

    Raises:
        RecipeError: no bundled recipe has that name.
    """
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"found no recipe named {quoted(name)}, expected one of {', '.join(names)}{did_you_mean(name, names)}"
            " or the path of a .yaml file",
            hint="mohawkify recipes ls lists the bundled recipes",
        )
    return resources.files(_PACKAGE).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
