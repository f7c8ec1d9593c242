"""The families of teachers: the files in `adapters/`, found by listing, and those that other packages register."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from typing import TYPE_CHECKING

from mohawkify.errors import UnknownFamilyError, did_you_mean, quoted
from mohawkify.families.unsupported import UNSUPPORTED
from mohawkify.files.listing import stems_in

if TYPE_CHECKING:
    from mohawkify.families.adapter import Adapter

ENTRY_POINT_GROUP = "mohawkify.adapters"
_ADAPTER_PACKAGE = "mohawkify.adapters"
_MODEL_TYPE = re.compile(r"[a-z0-9_]+")


def adapter_names() -> list[str]:
    """List the families by model type, sorted: the bundled files and those that other packages register."""
    return sorted({*stems_in(_ADAPTER_PACKAGE, ".py"), *_entry_points()})


def load_adapter(model_type: str) -> Adapter:
    """Import the adapter of a family; a bundled one comes before one that another package registers.

    Args:
        model_type: ``model_type`` in the teacher's ``config.json``; untrusted.

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
            f"found a teacher of the family {quoted(model_type)}, expected one of the {len(names)} that"
            f" `mohawkify families` lists, or a causal language model of transformers{did_you_mean(model_type, names)}",
            hint="docs/adapters.md says how to add a family: one file",
        )
    if model_type in stems_in(_ADAPTER_PACKAGE, ".py"):
        adapter: Adapter = importlib.import_module(f"{_ADAPTER_PACKAGE}.{model_type}").ADAPTER
        return adapter
    return _load_registered(model_type)


def _load_registered(model_type: str) -> Adapter:
    entry_point = _entry_points()[model_type]
    try:
        adapter: Adapter = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise UnknownFamilyError(
            f"the adapter {quoted(model_type)} is registered as {entry_point.value} but cannot be imported: {error}"
        ) from error
    if getattr(adapter, "model_type", None) != model_type:
        raise UnknownFamilyError(
            f"the adapter {quoted(model_type)} is registered as {entry_point.value}, which is not its Adapter"
        )
    return adapter


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
