"""Task files of one's own for lm-eval: read here as plain data, so that lm-eval itself never opens one.

A task file may come from a stranger. It may hold the settings that are listed here and nothing else, because lm-eval
and the libraries below it would import, fetch or run what others name; and it may name files beside it alone.
"""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mohawkify.errors import RecipeError, UsageError
from mohawkify.recipe.strict_yaml import load_yaml, read_text

SUFFIXES = (".yaml", ".yml")
# Kinds of files that hold rows and no code; the other kinds of datasets include pickles.
_LOCAL_DATA = ("json", "csv", "parquet", "arrow", "text")
_HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_Rows = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Dataset(_Part):
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None


class _Generation(_Part):
    until: str | list[str] | None = None
    max_gen_toks: int | None = Field(default=None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    num_beams: int | None = Field(default=None, ge=1, le=64)


class _Metric(_Part):
    metric: str
    aggregation: str | None = None
    higher_is_better: bool | None = None
    hf_evaluate: bool = False
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[str] | None = None


class _GroupMetric(_Part):
    metric: str
    aggregation: Literal["mean"] = "mean"
    weight_by_size: bool = True
    filter_list: str | list[str] | None = None


class _Step(_Part):
    function: Literal[
        "regex", "regex_pos", "multi_choice_regex", "remove_whitespace", "lowercase", "uppercase", "map",
        "take_first", "take_first_k", "majority_vote",
    ]  # fmt: skip
    regex_pattern: str | None = None
    group_select: int | None = None
    fallback: str | None = None
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    regexes_to_ignore: list[str] | None = None
    mapping_dict: dict[str, Any] | None = None
    default_value: Any = None
    k: int | None = Field(default=None, ge=1)


class _Filter(_Part):
    name: str
    filter: list[_Step]


class _Fewshot(_Part):
    sampler: Literal["default", "first_n"] = "default"
    split: str | None = None
    samples: list[_Rows] | None = None
    doc_to_text: str | None = None
    doc_to_target: str | int | None = None
    doc_to_choice: str | list[str] | _Rows | None = None
    gen_prefix: str | None = None
    fewshot_delimiter: str | None = None
    target_delimiter: str | None = None


class _Settings(_Part):
    """The settings of a task or a group; a group's members are checked one by one."""

    task: str | list[Any] | None = None
    task_alias: str | None = None
    group: str | None = None
    group_alias: str | None = None
    aggregate_metric_list: _GroupMetric | list[_GroupMetric] | None = None
    tag: str | list[str] | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: _Dataset | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    doc_to_text: str | None = None
    doc_to_target: str | int | list[str] | None = None
    doc_to_choice: str | list[str] | _Rows | None = None
    description: str | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    gen_prefix: str | None = None
    fewshot_config: _Fewshot | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    metric_list: list[_Metric] | None = None
    output_type: Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice"] | None = None
    generation_kwargs: _Generation | None = None
    repeats: int = Field(default=1, ge=1, le=1024)
    filter_list: list[_Filter] | None = None
    should_decontaminate: bool = False
    doc_to_decontamination_query: str | None = None
    metadata: _Rows | None = None


def read_task_file(path: Path, known_metrics: frozenset[str]) -> dict[str, Any]:
    """Read a task file with the files that it includes.

    Args:
        path: the file; what it includes and the rows it names lie in its folder, or below.
        known_metrics: the metrics that lm-eval has itself.

    Returns:
        The settings as lm-eval takes them, paths of rows made absolute.

    Raises:
        UsageError: it is no task file, or holds what a task of one's own may not have.
    """
    settings = _read(path, path.parent.resolve(), known_metrics, ())
    if not isinstance(settings.get("group", settings.get("task")), str):
        raise UsageError(f"{path} has neither a task: nor a group: name, expected one")
    return settings


def group_members(settings: dict[str, Any]) -> list[Any]:
    """The list under ``task`` in the settings of a group: names of members, or their settings."""
    members = settings.get("task")
    return members if isinstance(members, list) else []


def refusal(what: str, why: str) -> UsageError:
    """The error for a task that would run code."""
    return UsageError(
        f"{what} {why}; a task must be plain data here",
        hint="run such a task with lm-eval itself, on an exported student, if you trust it",
    )


def _read(path: Path, root: Path, known_metrics: frozenset[str], including: tuple[Path, ...]) -> dict[str, Any]:
    place = _inside(path, root)
    if place in including:
        raise UsageError(f"{path} includes itself")
    try:
        own, _ = load_yaml(read_text(place, str(path)), str(path))
    except RecipeError as error:
        raise UsageError(error.message) from error
    if not isinstance(own, dict):
        raise UsageError(f"{path} holds {type(own).__name__}, expected the settings of a task")
    included = own.pop("include", [])
    settings: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise UsageError(f"{path} includes {name!r}, expected the name of a file")
        settings |= _read(path.parent / name, root, known_metrics, (*including, place))
    for part in with_members(own):
        _check(path, part, known_metrics)
        _place_rows(path, part, {**settings, **own}.get("dataset_path"), root)
    return {**settings, **own}


def _inside(path: Path, root: Path) -> Path:
    """The real place of a plain file below a folder."""
    try:
        place = path.resolve(strict=True)
        is_plain = stat.S_ISREG(place.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a NUL byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the task file {path} cannot be read: {reason}") from error
    if not place.is_relative_to(root):
        raise UsageError(f"{path} lies outside of {root}, where the task file is")
    if not is_plain:
        raise UsageError(f"{path} is not a plain file")
    return place


def with_members(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a file and of the tasks that a group defines in place."""
    yield settings
    for member in group_members(settings):
        if isinstance(member, dict):
            yield from with_members(member)


def _check(path: Path, settings: dict[str, Any], known_metrics: frozenset[str]) -> None:
    for member in group_members(settings):
        named = isinstance(member, dict) and isinstance(member.get("group", member.get("task")), str)
        if not named and not isinstance(member, str):
            raise UsageError(f"{path} lists {member!r} in a group, expected a name or settings with a task: name")
    try:
        read = _Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise refusal(str(path), f"has the key {key}") from error
        raise UsageError(f"{path}: {key}: {first['msg']}, found {str(first['input'])[:60]!r}") from error
    for metric in read.metric_list or []:
        if metric.metric not in known_metrics or metric.hf_evaluate:
            raise refusal(str(path), f"has the metric {metric.metric}, which lm-eval does not have and would fetch")


def _place_rows(path: Path, settings: dict[str, Any], dataset: Any, root: Path) -> None:
    """Refuse rows that lie elsewhere, and make the paths of the others absolute."""
    dataset = settings.get("dataset_path", dataset)
    is_local = dataset is None or dataset in _LOCAL_DATA
    if not is_local and (not _HUB_DATA.fullmatch(dataset) or Path(dataset).exists()):
        raise UsageError(
            f"{path}: dataset_path: found {dataset!r}, expected a dataset of the Hub or one of {', '.join(_LOCAL_DATA)}"
        )
    kwargs = settings.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    if files is None:
        return
    if not is_local:
        raise UsageError(f"{path}: dataset_kwargs.data_files: expected none for a dataset of the Hub")
    by_split = files if isinstance(files, dict) else {"train": files}
    settings["dataset_kwargs"] = {
        **kwargs,
        "data_files": {
            split: [
                glob.escape(str(_inside(path.parent / name, root)))  # datasets takes any path as a pattern
                for name in ([names] if isinstance(names, str) else names)
            ]
            for split, names in by_split.items()
        },
    }
