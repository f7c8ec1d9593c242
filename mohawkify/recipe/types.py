"""The types that a recipe's values have: counts, names, lists, and the section that holds them."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mohawkify.recipe.messages import CONFLICT, Expected

_COUNT_UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}
_COUNT_TEXT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE]\+?[0-9]{1,2})?)([kMB]?)", re.ASCII)
_LARGEST_COUNT = 10**15


def parse_count(value: Any) -> Any:
    """Reads ``80M``, ``2.7B``, ``300k`` or ``1e6`` as the whole number that it means.

    Raises:
        ValueError: the value is none of these, or not a whole number.
    """
    if isinstance(value, str):
        match = _COUNT_TEXT.fullmatch(value)
        if match is None:
            raise ValueError("not a count")
        exact = Fraction(match[1]) * _COUNT_UNITS.get(match[2], 1)
    elif isinstance(value, float) and math.isfinite(value):
        exact = Fraction(value)
    else:
        return value  # a whole number, or a value that pydantic refuses
    if exact.denominator != 1:
        raise ValueError("not a whole number")
    return exact.numerator


def format_count(count: int) -> str | int:
    """Writes a count the short way where that takes at most two decimals and loses nothing: 2760000000 is ``2.76B``."""
    for unit, size in reversed(_COUNT_UNITS.items()):
        hundredths, rest = divmod(count * 100, size)
        if count >= size and rest == 0:
            return f"{Decimal(hundredths) / 100:f}{unit}"
    return count


def _as_tuple(items: Any) -> Any:
    """YAML has lists, a frozen recipe tuples."""
    return tuple(items) if isinstance(items, list) else items


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(items)) < len(items):
        raise ValueError("the same item twice")
    return items


def _above_zero(share: str) -> str:
    if float(share.removesuffix("%")) == 0:
        raise ValueError("a share of nothing")
    return share


def _plain_values(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str | int | float | bool) for item in items):
        raise ValueError("neither a plain value nor a list of these")
    return _as_tuple(value)


LearningRate = Annotated[
    Annotated[float, Field(gt=0)] | Literal["auto"],
    Expected("a number above 0, auto"),
]
COUNT = Expected("a count such as 80M")
Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, le=_LARGEST_COUNT), COUNT]
PositiveCount = Annotated[
    int,
    BeforeValidator(parse_count),
    Field(ge=1, le=_LARGEST_COUNT),
    Expected("a count of at least 1, such as 200k"),
    COUNT,
]
Text = Annotated[str, Field(min_length=1), Expected("text")]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\r\n]+$"), Expected("one line of text")]
Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    Expected("a name of letters, digits, dots, dashes and underscores"),
]
MicroBatch = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"],
    Expected("a whole number of at least 1, auto"),
]
Item = TypeVar("Item")
ListOf = Annotated[tuple[Item, ...], BeforeValidator(_as_tuple)]
Pair = Annotated[tuple[Item, Item], BeforeValidator(_as_tuple)]
Part = Literal["mixer", "mlp", "norm", "embedding", "head"]
Scalars = Annotated[
    str | int | float | bool | tuple[str | int | float | bool, ...],
    BeforeValidator(_plain_values),
    Expected("text, a number, true or false, or a list of these"),
]
Parts = Annotated[
    ListOf[Part],
    AfterValidator(_distinct),
    Field(min_length=1),
    Expected("a list of mixer, mlp, norm, embedding, head, each once"),
]
LayerParts = Annotated[
    ListOf[Literal["mixer", "mlp", "norm"]],
    AfterValidator(_distinct),
    Field(min_length=1),
    Expected("a list of mixer, mlp, norm, each once"),
]
Layers = Annotated[
    ListOf[Annotated[int, Field(ge=0)]],
    AfterValidator(_distinct),
    Expected("a list of layer numbers, each once"),
]
Share = Annotated[
    str,
    Field(pattern=r"^[0-9]{1,2}(\.[0-9]{1,3})?%$"),
    AfterValidator(_above_zero),
    Expected("a share above 0, such as 2%"),
]
KeptLayers = Annotated[Layers | Literal["auto"], Expected("a list of layer numbers, each once, or auto")]
KeptHeads = Annotated[
    Annotated[ListOf[Pair[Annotated[int, Field(ge=0)]]], AfterValidator(_distinct)] | Share,
    Expected("a list of pairs of a layer and a head, each once, or a share such as 2%"),
]


def conflict(key: tuple[str, ...], message: str) -> NoReturn:
    """Refuses values that are right alone and wrong together; `key` is the path to the one to change."""
    raise PydanticCustomError(CONFLICT, "{message}", {"message": message, "key": key})


class Section(BaseModel):
    """A part of a recipe: frozen, with no unknown keys, and no value of another type read as if it were right."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
