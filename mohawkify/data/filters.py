"""Which rows of a table are used: typed comparisons of a column with a value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mohawkify.errors import DataError

if TYPE_CHECKING:
    from mohawkify.data.readers import Row
    from mohawkify.recipe.schema import Condition

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def column_value(row: Row, column: str) -> Any:
    """Return the row's value in the column, refusing a column that the row does not have.

    Raises:
        DataError: naming the columns that are there.
    """
    if column not in row.columns:
        raise DataError(
            f"{row.where} has no column {column!r}; it has: {', '.join(map(str, row.columns)) or 'none'}",
            hint="name one of these columns under data in the recipe",
        )
    return row.columns[column]


def meets_all(row: Row, conditions: Iterable[Condition]) -> bool:
    """Whether the row meets every condition; a missing value (null) meets none.

    Raises:
        DataError: if a column is not there, or holds another kind of value than it is compared with.
    """
    return all(_meets(row, condition) for condition in conditions)


def _meets(row: Row, condition: Condition) -> bool:
    value = column_value(row, condition.column)
    if value is None:
        return False
    allowed = condition.value if isinstance(condition.value, tuple) else (condition.value,)
    expected = {_kind(choice) for choice in allowed}
    if _kind(value) not in expected:
        raise DataError(
            f"{row.where}: column {condition.column!r} holds {_kind(value)} ({value!r:.60}),"
            f" but is compared with {' or '.join(sorted(expected))}",
            hint="write the value of the condition as the column holds it",
        )
    if condition.operator == "in":
        return any(value == choice for choice in allowed if _kind(choice) == _kind(value))  # to Python, 1 is True
    return _COMPARISONS[condition.operator](value, condition.value)


def _kind(value: Any) -> str:
    # bool is an int to Python, but a yes/no column compared with a number is a mistake.
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return f"a {type(value).__name__}"
