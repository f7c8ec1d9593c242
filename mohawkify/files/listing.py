"""The files of an installed folder of data, found by listing."""

from __future__ import annotations

from importlib import resources


def stems_in(package: str, suffix: str) -> list[str]:
    """The names of a package's files with a suffix, without it, sorted; not those that begin with an underscore."""
    names = [entry.name for entry in resources.files(package).iterdir()]
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix) and not name.startswith("_"))
