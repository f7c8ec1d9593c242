"""Which local files a path names; of the folders of the datasets library those that hold the data itself."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mohawkify.errors import DataError
from mohawkify.files import atomic

if TYPE_CHECKING:
    from mohawkify.recipe.schema import Source

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
TEACHER_PREFIX = "teacher:"
_DEFAULT_SPLIT = "train"
_STATE, _SPLITS, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"  # of the datasets library
_CHECK_PATH = "check the path under data in the recipe"


def find_files(source: Source, teacher_directory: Path | None) -> list[Path]:
    """List the files that a source's file, folder or glob names, sorted by path.

    Folders are searched with their subfolders; in folders and globs, files of other kinds are passed over. A name that
    is there wins over its reading as a pattern, be it that of the whole path or of the folders it begins with.

    Args:
        source: has the path as written in the recipe, ``teacher:REL`` relative to the teacher's folder, and the split.
        teacher_directory: the teacher's folder, if it has one.

    Raises:
        DataError: if nothing readable is found there.
    """
    assert source.path is not None  # the recipe takes exactly one of path, hub and demo
    location = _locate(source.path, teacher_directory)
    try:
        files = _list_files(location, source.split)
    except OSError as error:
        raise DataError(f"cannot read {location}: {error.strerror}", hint=_CHECK_PATH) from error
    if not files:
        raise DataError(f"{location} matches no {', '.join(SUFFIXES)} file", hint=_CHECK_PATH)
    return files


def _locate(path: str, teacher_directory: Path | None) -> Path:
    if not path.startswith(TEACHER_PREFIX):
        return Path(os.path.expanduser(path))
    if teacher_directory is None:
        raise DataError(
            f"{path} is relative to the teacher's folder, but the teacher is not a local folder",
            hint="give the text as a path of its own",
        )
    return teacher_directory / path.removeprefix(TEACHER_PREFIX)


def _list_files(location: Path, split: str) -> list[Path]:
    if location.is_file():
        if location.suffix not in SUFFIXES:
            raise DataError(f"{location} is not one of the known kinds of text file", hint=f"use {', '.join(SUFFIXES)}")
        if split != _DEFAULT_SPLIT:
            raise _without_splits(location, split)
        return [location]
    if location.is_dir():
        base = location
        candidates = [file for file in location.rglob("*") if not _is_hidden(file.relative_to(location))]
    else:
        base = next(folder for folder in location.parents if folder.is_dir())
        pattern = str(location.relative_to(base))
        if not glob.has_magic(pattern):
            raise DataError(f"there is no file or folder {location}", hint=_CHECK_PATH)
        candidates = [base / name for name in glob.glob(pattern, root_dir=base, recursive=True)]
    files = [file for file in candidates if file.suffix in SUFFIXES and file.is_file()]
    choices = {folder: _choice(folder, base, split) for folder in {f.parent for f in files if f.suffix == ".arrow"}}
    if split != _DEFAULT_SPLIT and not any(choice.has_splits for choice in choices.values()):
        raise _without_splits(location, split)
    return sorted(file for file in files if file.suffix != ".arrow" or choices[file.parent].is_data(file.name))


class _Choice(NamedTuple):
    """Which .arrow files of a folder are read.

    Args:
        is_data: whether a file is, by its name.
        has_splits: whether the folder holds a split of a dataset, or several.
    """

    is_data: Callable[[str], bool]
    has_splits: bool = False


def _choice(folder: Path, base: Path, split: str) -> _Choice:
    """Read what the datasets library wrote beside its files; it keeps results of its own there, in cache-*.arrow.

    Args:
        folder: holds .arrow files.
        base: where the search began; a split whose own folder is named is read whatever its name.
        split: which one to read where there are several.
    """
    state = _json_object(folder / _STATE)
    if "_data_files" in state:
        names = {entry["filename"] for entry in _objects(state["_data_files"]) if "filename" in entry}
        missing = sorted(str(name) for name in names if not isinstance(name, str) or not (folder / name).is_file())
        if missing:
            raise DataError(f"{folder / _STATE} names {missing[0]}, which is not there", hint="fetch the folder again")
        splits = _json_object(folder.parent / _SPLITS).get("splits") if folder != base else None
        if not isinstance(splits, list):
            return _Choice(names.__contains__)
        _require_split(folder.parent, split, splits)
        return _Choice(names.__contains__ if folder.name == split else lambda name: False, True)
    info = _json_object(folder / _INFO)
    if not info:
        return _Choice(lambda name: True)
    splits = list(info["splits"]) if isinstance(info.get("splits"), dict) else []
    if len(splits) < 2:
        return _Choice(lambda name: not name.startswith("cache-"))
    _require_split(folder, split, splits)
    pattern = re.compile(rf"(?!cache-)(.*-)?{re.escape(split)}(-\d+-of-\d+)?\.arrow")
    return _Choice(lambda name: pattern.fullmatch(name) is not None, True)


def _require_split(folder: Path, split: str, splits: list[Any]) -> None:
    if split not in splits:
        raise DataError(
            f"{folder} has no split {split!r}; it has: {', '.join(map(str, splits))}",
            hint="name one of these with `split` beside the path",
        )


def _without_splits(location: Path, split: str) -> DataError:
    return DataError(
        f"{location} holds no splits, but the split {split!r} is asked for",
        hint="leave `split` out, or name the folder of a DatasetDict",
    )


def _json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that may be absent, or another program's and no object."""
    content = atomic.read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)
