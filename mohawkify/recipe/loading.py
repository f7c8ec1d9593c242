"""Reading, overriding and writing recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mohawkify.errors import RecipeError
from mohawkify.recipe.bundled import recipe_text
from mohawkify.recipe.messages import explain, show, show_key
from mohawkify.recipe.schema import CalibrateRecipe, ComputeRecipe, Recipe, StudentRecipe, recipe_model
from mohawkify.recipe.stages import objective_of, stages_model
from mohawkify.recipe.strict_yaml import (
    MAX_DEPTH,
    KeyPath,
    Lines,
    YamlProblem,
    dump_yaml,
    load_yaml,
    parse_yaml,
    read_text,
)
from mohawkify.recipe.types import COUNT, Section, format_count


def parse_recipe(text: str, source: str) -> Recipe:
    """Reads a recipe from YAML.

    Args:
        text: the YAML.
        source: the name of its file, for errors.

    Raises:
        RecipeError: the text is not YAML or breaks the schema; names file, line and key.
    """
    data, lines = load_yaml(text, source)
    return _validate(data, source, lines)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a bundled recipe by its name, or any recipe by the path of its .yaml file.

    Raises:
        RecipeError: there is no such recipe, or it is not YAML or breaks the schema.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return parse_recipe(read_text(Path(name), name), name)
    return parse_recipe(recipe_text(name), f"{name}.yaml")


def dump_recipe(recipe: Recipe) -> str:
    """Writes a recipe with every value spelt out, so that reading it back gives an equal recipe."""
    return dump_yaml(_plain(recipe))


def comparable_text(recipe: Recipe) -> str:
    """A recipe as text without what changes the result of a run by rounding only: two such texts mean the same run.

    That is all of ``compute`` but the precision: engine, ZeRO, micro-batch, kernels, device, threads. Nor does it
    matter how many bad rows are allowed in text that has fewer.
    """
    compute = ComputeRecipe(precision=recipe.compute.precision)
    data = recipe.data.model_copy(update={"skip_bad_rows": 0})
    return dump_recipe(recipe.model_copy(update={"compute": compute, "data": data}))


def apply_overrides(recipe: Recipe, overrides: list[str] | tuple[str, ...]) -> Recipe:
    """Changes single values of a recipe.

    Args:
        recipe: the recipe to start from.
        overrides: ``key=value`` each, the key with dots, the value as in YAML: ``stages.distill.tokens=5B``. A list
            item is named by its index; the index one past the end appends. Later ones win.

    Raises:
        RecipeError: an override is malformed, its key unknown or its value wrong.
    """
    data = _plain(recipe)
    set_keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(
                f"--set {show(override)}: found no =, expected key=value, such as stages.distill.tokens=5B"
            )
        path = tuple(int(part) if re.fullmatch("[0-9]{1,4}", part) else part for part in key.strip().split("."))
        if len(path) > MAX_DEPTH:
            raise RecipeError(f"--set {show(key)}: found more than {MAX_DEPTH} levels of keys")
        try:
            value, _ = parse_yaml(text)
        except YamlProblem as error:
            raise RecipeError(f"--set {show_key(path)}: {error.problem}") from error
        _set(data, path, value)
        set_keys.append(path)
    return _validate(data, "--set", {}, tuple(set_keys))


def _set(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Puts a value into nested plain data; missing sections on the way are created."""
    container: Any = data
    for depth, part in enumerate(path):
        where = f"--set {show_key(path)}"
        is_last = depth == len(path) - 1
        if isinstance(container, list):
            if not isinstance(part, int) or part > len(container):
                wanted = f"an index of at most {len(container)}"
                raise RecipeError(
                    f"{where}: found {show(part)} for an item of {show_key(path[:depth])}, expected {wanted}"
                )
            if part == len(container):
                container.append({})
        elif isinstance(container, dict):
            part = str(part)
            if not is_last and container.get(part) is None:
                container[part] = {}
        else:
            raise RecipeError(f"{where}: {show_key(path[:depth])} holds a value and has no keys")
        if is_last:
            container[part] = value
        container = container[part]


def _follow_start(data: Any, set_keys: tuple[KeyPath, ...]) -> Any:
    """Add the stage of a calibrated start to a recipe that has none, and drop it where overrides chose another start.

    What is wrong with the data is left to the schema.
    """
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, dict):
        return data
    try:
        start = StudentRecipe.model_validate(data.get("student", {})).start
    except ValidationError:
        return data
    found = {name for name, block in stages.items() if objective_of(name, block) == "closed_form"}
    if start == "calibrated" and not found:
        return {**data, "stages": {"calibrate": _default_calibration(stages), **stages}}
    is_chosen = any(key[0] == "student" for key in set_keys)
    if (
        start != "calibrated"
        and is_chosen
        and not any(set(key[:2]) == {"stages", name} for key in set_keys for name in found)
    ):
        return {**data, "stages": {name: block for name, block in stages.items() if name not in found}}
    return data


def _default_calibration(stages: dict[Any, Any]) -> dict[str, Any]:
    """Sequences that can be cut out of the longest of the other stages, as many at a time as the last stage has."""
    blocks = [block for block in stages.values() if isinstance(block, dict)]
    lengths = [length for block in blocks if isinstance(length := block.get("sequence_length"), int) and length > 1]
    if not lengths:
        return {}
    longest, usual = max(lengths), CalibrateRecipe().sequence_length
    length = next((short for short in range(usual, 1, -1) if longest % short == 0), longest)
    batch = blocks[-1].get("batch_sequences")
    return {"sequence_length": length} | ({"batch_sequences": batch} if isinstance(batch, int) and batch > 0 else {})


def _validate(data: Any, source: str, lines: Lines, set_keys: tuple[KeyPath, ...] = ()) -> Recipe:
    data = _follow_start(data, set_keys)
    model = recipe_model(stages_model(data.get("stages") if isinstance(data, dict) else None))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        message, hint = explain(error, model, source, lines, set_keys)
        raise RecipeError(message, hint) from error


def _plain(value: Any, field_metadata: tuple[Any, ...] = ()) -> Any:
    """Turns a recipe into plain data as a YAML file would hold it, without the keys that are null when left out."""
    if isinstance(value, Section):
        return {
            name: _plain(getattr(value, name), tuple(field.metadata))
            for name, field in type(value).model_fields.items()
            if getattr(value, name) is not None or field.default is not None
        }
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return format_count(value) if COUNT in field_metadata else value
