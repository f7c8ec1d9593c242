"""Strict JSON: no numbers that are not finite, no key twice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawkify.errors import CheckpointError, NumericsError


def render_json(value: Any, path: Path) -> str:
    """Write a value as JSON for a file; raises NumericsError where a number is not finite."""
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (ValueError, RecursionError) as error:  # Python reads deeper nesting than it writes
        raise NumericsError(f"cannot write {path} as strict JSON: {error}") from error


def parse_json(data: bytes, name: str) -> Any:
    """Read JSON; raises CheckpointError, naming its source, where it is not strict."""
    try:
        return json.loads(
            data.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not strict JSON: {error}") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def spell_non_finite(value: Any) -> Any:
    """Replace numbers that are not finite by their names, which `float()` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: spell_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [spell_non_finite(item) for item in value]
    return value
