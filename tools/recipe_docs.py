"""The list of all recipe keys in docs/recipes.md, written from the schema."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mohawkify.recipe.messages import expected, section_of
from mohawkify.recipe.schema import Recipe
from mohawkify.recipe.strict_yaml import dump_yaml
from mohawkify.recipe.types import COUNT, Section, format_count

BEGIN = "<!-- From here to the end mark the page is written from the schema; `tools.recipe_docs` renews it. -->"
END = "<!-- End of what is written from the schema. -->"


def recipe_reference() -> str:
    """Writes Markdown with a table for every section of a recipe: its keys, what they accept, defaults and meanings."""
    places: dict[type[BaseModel], list[str]] = {}
    _collect(Recipe, "", places)
    return "\n".join(_section_text(section, names) for section, names in places.items())


def with_reference(page: str) -> str:
    """Returns a Markdown page with the part between its two marks written anew.

    Raises:
        ValueError: the page lacks a mark.
    """
    return replace_between(page, BEGIN, END, recipe_reference())


def replace_between(page: str, begin: str, end: str, text: str) -> str:
    """Returns a page with new text between two marks, which stay; raises ValueError where the page lacks one."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page lacks one of the marks {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def _collect(section: type[BaseModel], name: str, places: dict[type[BaseModel], list[str]]) -> None:
    """Gathers every section of the schema, in order, with the names under which it occurs."""
    places.setdefault(section, []).append(name)
    for key, field in section.model_fields.items():
        inner, is_list = section_of(field.annotation)
        if inner is not None:
            _collect(inner, f"{name}.{key}".lstrip(".") + (".N" if is_list else ""), places)


def _section_text(section: type[BaseModel], names: list[str]) -> str:
    title = ", ".join(f"`{name}`" for name in names) if names != [""] else "The top of the file"
    table = ["| key | value | default | meaning |", "|---|---|---|---|"]
    table += [_row(key, field) for key, field in section.model_fields.items()]
    return "\n".join([f"### {title}", "", section.__doc__ or "", "", *table, ""])


def _row(key: str, field: FieldInfo) -> str:
    value = expected(field.annotation, tuple(field.metadata))
    cells = [f"`{key}`", value, _default(field), field.description or ""]
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "its defaults"
    default = format_count(field.default) if COUNT in field.metadata else field.default
    return f"`{dump_yaml({'key': default}).removeprefix('key: ').rstrip()}`"
