"""The values that each key accepts, in words: the one source for errors and for the table in docs/recipes.md."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mohawkify.errors import nearest
from mohawkify.recipe.strict_yaml import KeyPath, Lines

CONFLICT = "conflict"  # the type of the errors that several keys cause together
_MOST_SHOWN = 60
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Expected:
    """Annotates a type with the values that it accepts, if the type alone does not show them."""

    text: str


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name (``N`` stands for a list index) and its field."""

    name: str
    field: FieldInfo


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yields every key of a schema that holds a value, not those of sections, in order."""
    for name, field in model.model_fields.items():
        section, is_list = section_of(field.annotation)
        dotted = f"{prefix}{name}"
        if section is None:
            yield Key(dotted, field)
        else:
            yield from keys(section, f"{dotted}.N." if is_list else f"{dotted}.")


def expected(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """The values of a type with its constraints in words, for example ``a whole number of at least 1``."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return expected(inner, (*metadata, *extra))
    metadata = _constraints(metadata)
    for item in metadata:
        if isinstance(item, Expected):
            return item.text
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for item in arguments for option in _options(item, metadata)]
        return _either(options)
    if get_origin(annotation) is Literal:
        return _either(_options(annotation, metadata))
    if get_origin(annotation) is tuple:
        return _expected_list(arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return plain[annotation] + _range(metadata)


def explain(
    error: ValidationError, model: type[BaseModel], source: str, lines: Lines, set_keys: tuple[KeyPath, ...] = ()
) -> tuple[str, str | None]:
    """Turns the errors of a validation into one line and a hint.

    Args:
        model: the schema that the data was checked against.
        source: where the data came from, for example a file name.
        lines: the line of each key; empty where the data has no lines.
        set_keys: the full keys of overrides, for suggestions on misspelt ones.

    Returns:
        The message, ``source:line: key: found ..., expected ...`` for each problem, and the help text of the first key.
    """
    errors = error.errors(include_url=False)
    problems: dict[KeyPath, ErrorDetails] = {}  # ordered, and without the repetitions that a union of types causes
    for details in errors:
        problems.setdefault(_path(model, details), details)
    # Guessing what thousands of unknown keys mean would take seconds: only what is shown is put into words.
    shown = [
        f"{_place(source, lines, path)}: {_problem(details, model, path, set_keys)}"
        for path, details in list(problems.items())[:_MOST_PROBLEMS]
    ]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "; ".join(shown), _hint(model, _path(model, errors[0]))


def show_key(path: KeyPath) -> str:
    """Writes a key path with dots; a part that is not a plain word is quoted, so that it fits one line."""
    parts = [str(part) if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", str(part)) else show(part) for part in path]
    return ".".join(parts)


def show(value: Any) -> str:
    """Writes a value on one line, cut short where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _problem(details: ErrorDetails, model: type[BaseModel], path: KeyPath, set_keys: tuple[KeyPath, ...]) -> str:
    key = show_key(path)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key, {_suggestion(model, path, set_keys)}"
    if details["type"] == CONFLICT:
        return f"{key}: {details['msg']}" if key else details["msg"]
    annotation, metadata, _ = _field(model, path)
    wanted = expected(annotation, metadata)
    if details["type"] == "missing":
        return f"{key}: missing, expected {wanted}"
    found = f"found {show(details['input'])}, expected {wanted}"
    return f"{key}: {found}" if key else found


def _suggestion(model: type[BaseModel], path: KeyPath, set_keys: tuple[KeyPath, ...]) -> str:
    """Guesses what an unknown key means: first among its neighbours, then among all keys of the recipe."""
    annotation, _, _ = _field(model, path[:-1])
    section, _ = section_of(annotation)
    siblings = list(section.model_fields) if section else []
    wanted = next((key for key in set_keys if key[: len(path)] == path), path)
    sibling = nearest(str(path[-1]), siblings) if wanted == path else None
    if sibling:
        return f"did you mean {show_key((*path[:-1], sibling))}?"
    guess = nearest(show_key(wanted), [key.name for key in keys(model)])
    return f"did you mean {guess}?" if guess else f"expected {_either(siblings)}"


def _place(source: str, lines: Lines, path: KeyPath) -> str:
    """Names the line of a key, or of the section that lacks it."""
    if not lines:
        return source
    while path not in lines:
        path = path[:-1]
    return f"{source}:{lines[path]}"


def _hint(model: type[BaseModel], path: KeyPath) -> str | None:
    help_text = _field(model, path)[2] if _is_known(model, path) else ""
    return f"{show_key(path)}: {help_text}" if help_text else None


def _path(model: type[BaseModel], details: ErrorDetails) -> KeyPath:
    """Finds the key an error is about: pydantic's path without what it adds to name the member of a union."""
    path = details["loc"]
    if details["type"] == CONFLICT:
        return (*path, *details["ctx"]["key"])
    while details["type"] != "extra_forbidden" and not _is_known(model, path):
        path = path[:-1]
    return path


def _is_known(model: type[BaseModel], path: KeyPath) -> bool:
    try:
        _field(model, path)
    except KeyError:
        return False
    return True


def _field(model: type[BaseModel], path: KeyPath) -> tuple[Any, tuple[Any, ...], str]:
    """Looks up the type, constraints and help text behind a key path; KeyError where the schema has no such key."""
    annotation: Any = model
    metadata: tuple[Any, ...] = ()
    help_text = ""
    for part in path:
        section, is_list = section_of(annotation)
        if isinstance(part, int):
            if get_origin(annotation) is not tuple:
                raise KeyError(part)
            annotation, metadata = get_args(annotation)[0], ()
        elif section is None or is_list:
            raise KeyError(part)
        else:
            field = section.model_fields[part]
            annotation, metadata, help_text = field.annotation, tuple(field.metadata), field.description or ""
    return annotation, metadata, help_text


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Finds the section that a type holds, alone, optional or as a list, and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = get_origin(annotation) is tuple
    for argument in get_args(annotation):
        section, _ = section_of(argument)
        if section is not None:
            return section, is_list
    return None, False


def _options(annotation: Any, metadata: tuple[Any, ...]) -> list[str]:
    """Lists in words what one member of a union accepts, word by word where it is a choice of words."""
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is Literal:
        return [str(item) for item in get_args(annotation)]
    return [expected(annotation, metadata)]


def _expected_list(arguments: tuple[Any, ...]) -> str:
    if arguments[-1] is Ellipsis:
        section, _ = section_of(arguments[0])
        return "a list of sections" if section else f"a list, each item {expected(arguments[0])}"
    return f"a list of {len(arguments)}, each item {expected(arguments[0])}"


def _constraints(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    """Opens the Field(...) that stands inside an Annotated type; pydantic opens only those of whole fields."""
    opened: list[Any] = []
    for item in metadata:
        opened.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return tuple(opened)


def _range(metadata: tuple[Any, ...]) -> str:
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    bounds = [
        f"{words[type(each)]} {getattr(each, type(each).__name__.lower())}" for each in metadata if type(each) in words
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
