"""What is on the shelf: the recipes in `recipes/` and the families in `adapters/`, found by listing."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterable
from importlib import metadata, resources
from typing import TYPE_CHECKING

from mohawkify.errors import RecipeError, UnknownFamilyError
from mohawkify.unsupported import UNSUPPORTED

if TYPE_CHECKING:
    from mohawkify.adapter import Adapter

ENTRY_POINT_GROUP = "mohawkify.adapters"
_ADAPTER_PACKAGE = "mohawkify.adapters"
_RECIPE_PACKAGE = "mohawkify.recipes"
_MODEL_TYPE = re.compile(r"[a-z0-9_]+")
_LONGEST_NAME = 100  # Comparing names takes time that grows with their length, and names come from strangers' files.


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that a mistyped name most likely means, or None where none is close."""
    matches = difflib.get_close_matches(name[:_LONGEST_NAME], list(candidates), n=1)
    return matches[0] if matches else None


def recipe_names() -> list[str]:
    """Lists the bundled recipes by name, sorted."""
    return _stems(_RECIPE_PACKAGE, ".yaml")


def recipe_text(name: str) -> str:
    """Returns the YAML text of a bundled recipe.

    Raises:
        RecipeError: no bundled recipe has that name.
    """
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"found no recipe named {_shown(name)}, expected {_one_of(name, names)} or the path of a .yaml file",
            hint="mohawkify recipes ls lists the bundled recipes",
        )
    return resources.files(_RECIPE_PACKAGE).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def adapter_names() -> list[str]:
    """Lists the families by model type, sorted: the bundled files and those that other packages register."""
    return sorted({*_stems(_ADAPTER_PACKAGE, ".py"), *_entry_points()})


def load_adapter(model_type: str) -> Adapter:
    """Imports the adapter of a family; a bundled one comes before one that another package registers.

    Args:
        model_type: ``model_type`` in the teacher's ``config.json``; trusted no more than that file is.

    Raises:
        UnknownFamilyError: no adapter has that name (nothing was imported), or the registered one is broken.
    """
    names = adapter_names()
    if model_type in UNSUPPORTED and model_type not in names:
        raise UnknownFamilyError(
            f"a teacher of the family {model_type} cannot be converted: {UNSUPPORTED[model_type]}",
            hint="docs/families.md lists the families that can",
        )
    if not _MODEL_TYPE.fullmatch(model_type) or model_type not in names:
        raise UnknownFamilyError(
            f"found a teacher of the family {_shown(model_type)}, expected one of the {len(names)} that"
            f" `mohawkify families` lists, or a causal language model of transformers{_guess(model_type, names)}",
            hint="docs/adapters.md says how to add a family: one file",
        )
    if model_type in _stems(_ADAPTER_PACKAGE, ".py"):
        adapter: Adapter = importlib.import_module(f"{_ADAPTER_PACKAGE}.{model_type}").ADAPTER
        return adapter
    return _load_registered(model_type)


def _load_registered(model_type: str) -> Adapter:
    entry_point = _entry_points()[model_type]
    try:
        adapter: Adapter = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise UnknownFamilyError(
            f"the adapter {_shown(model_type)} is registered as {entry_point.value} but cannot be imported: {error}"
        ) from error
    if getattr(adapter, "model_type", None) != model_type:
        raise UnknownFamilyError(
            f"the adapter {_shown(model_type)} is registered as {entry_point.value}, which is not its Adapter"
        )
    return adapter


def _stems(package: str, suffix: str) -> list[str]:
    names = [entry.name for entry in resources.files(package).iterdir()]
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix) and not name.startswith("_"))


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _shown(name: str) -> str:
    return json.dumps(name[:_LONGEST_NAME])


def _one_of(name: str, names: list[str]) -> str:
    return f"one of {', '.join(names)}{_guess(name, names)}"


def _guess(name: str, names: list[str]) -> str:
    guess = nearest(name, names)
    return f" (did you mean {guess}?)" if guess else ""
