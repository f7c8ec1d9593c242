"""Any text read as a recipe, and any override: a recipe that survives being written, or one line of error."""

from __future__ import annotations

import json
from random import Random
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mohawkify.errors import RecipeError
from mohawkify.recipe.bundled import recipe_names, recipe_text
from mohawkify.recipe.loading import apply_overrides, dump_recipe, parse_recipe
from mohawkify.recipe.messages import keys
from mohawkify.recipe.schema import Condition, Recipe, Source, StageRecipe
from mohawkify.recipe.strict_yaml import dump_yaml
from mohawkify.recipe.types import COUNT, Name
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.mutate import WORDS, mutate_bytes, mutate_json, mutate_lines, odd_value, render

SHIPPED = [recipe_text(name) for name in recipe_names()]
TEXTS = (
    "text",
    "a b",
    "x.txt",
    "é",
    "0",
    "null",
    "- a",
    "a: b",
    "#",
    "'",
    '"',
    "\u2028",
    "\x85",
    " ",
    "~",
    "1e-4",
    "@",
)
KEYS = [key.name.replace("N", "0") for key in keys(Recipe)]


def check_text(case: bytes) -> None:
    """Judge a recipe's text."""
    text = case.decode("utf-8", "surrogatepass")
    try:
        recipe = parse_recipe(text, "r.yaml")
    except RecipeError as error:
        _assert_one_line(error)
        require_message(error, "r.yaml:")
        return
    _assert_survives(recipe)


def check_override(case: bytes) -> None:
    """Judge overrides of a shipped recipe, one a line of JSON."""
    recipe = parse_recipe(recipe_text("stories"), "stories.yaml")
    try:
        changed = apply_overrides(recipe, json.loads(case))
    except RecipeError as error:
        _assert_one_line(error)
        return
    _assert_survives(changed)


def _assert_one_line(error: RecipeError) -> None:
    assert len(error.message.splitlines()) == 1, error.message
    assert error.exit_code == 64


def _assert_survives(recipe: Recipe) -> None:
    written = dump_recipe(recipe)
    again = parse_recipe(written, "again.yaml")
    assert again == recipe
    assert dump_recipe(again) == written


def sample(rng: Random, annotation: Any, metadata: tuple[Any, ...] = ()) -> Any:
    """A value that a type of the schema accepts, as plain data; now and then one that it does not."""
    if rng.random() < 0.01:
        return odd_value(rng)
    if annotation is Name or any("A-Za-z0-9" in str(getattr(item, "pattern", "")) for item in metadata):
        return rng.choice(("a", "A-b.c_9", "x" * 100, "0", "true", "1e5", "null"))
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return sample(rng, inner, (*metadata, *extra))
    metadata = tuple(each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else [item]))
    if COUNT in metadata:
        return rng.choice((1, 1000, 10**15, 1e6, "80M", "2.7B", "300k", "1e6", rng.randrange(1, 10**15)))
    if get_origin(annotation) is Literal:
        return rng.choice(get_args(annotation))
    if get_origin(annotation) is tuple:
        return _sample_list(rng, get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _sample_section(rng, annotation)
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return sample(rng, rng.choice(get_args(annotation)), metadata)
    return _sample_plain(rng, annotation, metadata)


def _sample_plain(rng: Random, annotation: Any, metadata: tuple[Any, ...]) -> Any:
    if annotation is type(None):
        return None
    if annotation is bool:
        return rng.random() < 0.5
    if annotation is str:
        return (
            rng.choice(TEXTS) if rng.random() < 0.8 else "".join(rng.choices("ab :#-\n\t'\"é\u2029{}[]&*!|>%@`", k=9))
        )
    lows = [item.ge for item in metadata if isinstance(item, Ge)] + [
        item.gt for item in metadata if isinstance(item, Gt)
    ]
    highs = [item.le for item in metadata if isinstance(item, Le)] + [
        item.lt for item in metadata if isinstance(item, Lt)
    ]
    low, high = max(lows, default=-100), min(highs, default=2**20)
    if annotation is int:
        return rng.choice((low, low + 1, low + 2, high, rng.randint(low, min(high, low + 4096))))
    return rng.choice((0.5, 1e-4, 1e-8, low + (high - low) * rng.random(), low + rng.random() * 1e-3))


def _sample_list(rng: Random, arguments: tuple[Any, ...]) -> list[Any]:
    if arguments[-1] is not Ellipsis:
        return [sample(rng, item) for item in arguments]
    items = [sample(rng, arguments[0]) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    return [item for index, item in enumerate(items) if isinstance(item, dict) or item not in items[:index]]


def _sample_section(rng: Random, model: type[BaseModel]) -> dict[str, Any]:
    section = {
        name: sample(rng, field.annotation, tuple(field.metadata))
        for name, field in model.model_fields.items()
        if field.is_required() or rng.random() < 0.2
    }
    if rng.random() < 0.02:
        section[rng.choice(("x", "", "name ", *model.model_fields))] = odd_value(rng)
    return _repaired(rng, model, section) if rng.random() < 0.97 else section


def _repaired(rng: Random, model: type[BaseModel], section: dict[str, Any]) -> dict[str, Any]:
    """Bring together what the schema wants together, so that most samples get past it."""
    if model is Source:
        place = rng.choice(("path", "hub", "demo"))
        dropped = {"path", "hub", "demo"} - {place} | (set() if place == "hub" else {"name", "split"})
        section = {key: value for key, value in section.items() if key not in dropped}
        section[place] = "train" if place == "demo" else "some/where"
    elif model is Condition:
        is_list = isinstance(section.get("value"), list)
        section["operator"] = "in" if is_list else rng.choice(("==", "!=", "<", ">="))
    elif issubclass(model, StageRecipe) and isinstance(section.get("final_phase"), dict):
        section["final_phase"]["tokens"], section["tokens"] = 1000, "80M"
    elif model is Recipe:
        data = section.setdefault("data", {})
        if isinstance(data, dict) and not data.get("final_phase"):
            data["final_phase"] = [{"demo": "train"}]
        compute = section.get("compute")
        if isinstance(compute, dict):
            compute["micro_batch_sequences"] = 1
    return section


def draw_schema(rng: Random) -> bytes:
    """A recipe made from the schema, in block or flow style, sometimes mutated."""
    data = _sample_section(rng, Recipe)
    if rng.random() < 0.8:
        _share_an_order(rng, data)
    if rng.random() < 0.15:
        data = mutate_json(rng, data)
    text = dump_yaml(data) if rng.random() < 0.5 else render(data)
    if rng.random() < 0.15:
        text = mutate_lines(rng, text)
    return text.encode("utf-8", "surrogatepass")


def _share_an_order(rng: Random, data: Any) -> None:
    """Give the stages lengths that divide the longest one; drawn ones hardly ever do."""
    stages = data.get("stages")
    sections = [stage for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    for section in (*sections, *(section.get("final_phase") for section in sections)):
        if isinstance(section, dict) and "sequence_length" in section:
            section["sequence_length"] = 2 ** rng.randint(1, 12)


def draw_shipped(rng: Random) -> bytes:
    """A shipped recipe with some lines changed."""
    lines = [line for line in rng.choice(SHIPPED).split("\n") if not line.lstrip().startswith("#")]
    return mutate_lines(rng, "\n".join(lines)).encode("utf-8", "surrogatepass")


def draw_bytes(rng: Random) -> bytes:
    """Text without sense, made of YAML's own signs and of odd words; some of it long."""
    kind = rng.random()
    if kind < 0.05:
        unit = rng.choice((*WORDS, "a: ", "a:\n ", "- ", "{a: ", "[", "? ", "a\n", "'\n", "k%d: 1\n", "x,", "\n", " "))
        count = rng.choice((10, 100, 1000, 5000))
        text = "".join(unit.replace("%d", str(index)) for index in range(count))
        return text.encode("utf-8", "surrogatepass")
    if kind < 0.5:
        text = "".join(rng.choices(WORDS + TEXTS + ("\n", "\n  ", ": ", "- ", "a"), k=rng.randint(0, 12)))
        return text.encode("utf-8", "surrogatepass")
    data = rng.choice((b"", b"name: a\n", b"stages: {orient: {tokens: 1}}\n", b"- {a: [b]}\n"))
    return mutate_bytes(rng, data + rng.randbytes(rng.randint(0, 30))).decode("latin-1").encode()


def draw_override(rng: Random) -> bytes:
    """Some overrides: keys that are there, keys that are not, and values of all kinds."""
    overrides = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(KEYS)
        if rng.random() < 0.3:
            key = rng.choice(
                (f"{key}.x", key[:-1], key.upper(), "", ".", "..", "data.train.9", "0", "x." * 50 + "x", key * 9)
            )
        value = rng.choice((rng.choice(WORDS), render(odd_value(rng)), rng.choice(TEXTS), str(rng.randint(0, 99))))
        if rng.random() < 0.01:
            key = f"{key}{'.a' * rng.choice((100, 900, 3000))}"
        overrides.append(key + rng.choice(("=", "=", "=", "=", "", "==")) + value)
    return json.dumps(overrides).encode()


@pytest.mark.parametrize(
    ("name", "number", "draw"),
    [("schema", 300, draw_schema), ("shipped", 300, draw_shipped), ("bytes", 6000, draw_bytes)],
)
def test_any_text(name: str, number: int, draw: Any) -> None:
    run_campaign(f"recipe-{name}", number, draw, check_text)


def test_any_override() -> None:
    run_campaign("recipe-override", 300, draw_override, check_override)


def test_samples_reach_past_the_schema() -> None:
    passed = 0
    for index in range(60):
        try:
            parse_recipe(draw_schema(Random(f"span {index}")).decode("utf-8", "surrogatepass"), "r.yaml")
            passed += 1
        except RecipeError:
            pass
    assert passed >= 15
