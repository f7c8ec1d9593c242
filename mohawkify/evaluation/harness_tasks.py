"""The tasks of lm-eval: found, checked and loaded with their questions before a model is."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mohawkify.errors import DataError, MissingExtraError, UsageError, cache_hint, nearest
from mohawkify.evaluation.harness_files import SUFFIXES, group_members, read_task_file, refusal, with_members


@dataclass(frozen=True)
class Preset:
    """A published set of tasks.

    Args:
        num_fewshot: solved examples in front of every question.
        metrics: the metric reported for each task.
    """

    num_fewshot: int
    metrics: dict[str, str]


PRESETS = {
    # Source: Llamba (arXiv 2502.14458), the zero-shot columns of its evaluation.
    "llamba": Preset(
        num_fewshot=0,
        metrics={
            "arc_challenge": "acc_norm",
            "arc_easy": "acc_norm",
            "piqa": "acc_norm",
            "winogrande": "acc",
            "hellaswag": "acc_norm",
            "lambada_openai": "acc",
            "mmlu": "acc",
            "openbookqa": "acc_norm",
        },
    ),
}


@dataclass(frozen=True)
class TaskSet:
    """Tasks of lm-eval, loaded and checked.

    Args:
        names: as given: tasks, groups, tags or files.
        tasks: every single task of lm-eval by name, the members of groups included.
        groups: its groups by name.
        num_fewshot: solved examples in front of every question; None for each task's own number, which is mostly 0.
        preset: the published set that they are; None where they were named one by one.
    """

    names: list[str]
    tasks: dict[str, Any]
    groups: dict[str, Any]
    num_fewshot: int | None
    preset: str | None = None


def load_preset(name: str, include_path: Path | None = None) -> TaskSet:
    """Load a published set of tasks; raises what `load_tasks` raises, and UsageError where there is no such set."""
    if name not in PRESETS:
        raise UsageError(f"found no preset named {name!r}, expected one of: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return replace(load_tasks(list(preset.metrics), preset.num_fewshot, include_path), preset=name)


def load_tasks(tasks: list[str], num_fewshot: int | None = None, include_path: Path | None = None) -> TaskSet:
    """Find, check and load tasks; nothing that a task file names is run.

    Args:
        tasks: names of lm-eval's tasks, groups or tags, of those in include_path, or paths of YAML files.
        num_fewshot: solved examples in front of every question; None for each task's own number.
        include_path: a folder with more task files.

    Raises:
        MissingExtraError: lm-eval is not installed.
        UsageError: an unknown task, or one that would run code or cannot run with these settings.
        DataError: a task's questions cannot be read.
    """
    import_lm_eval()
    if not tasks:
        raise UsageError("no task is named, expected at least one", hint="lm-eval ls tasks lists the bundled ones")
    with TemporaryDirectory() as cache:
        return _load(tasks, num_fewshot, include_path, Path(cache))


def _load(tasks: list[str], num_fewshot: int | None, include_path: Path | None, cache: Path) -> TaskSet:
    manager, names = _task_manager(tasks, include_path, cache)
    owners: dict[str, str] = {}
    loaded: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for spec, name in zip(tasks, names, strict=True):
        try:
            with quiet_lm_eval():
                found = manager.load(name)
        except Exception as error:  # lm-eval, datasets, Jinja and the network raise anything on a broken task
            raise DataError(
                f"the questions of task {spec} cannot be loaded: {first_line(error)}",
                hint=cache_hint(error)
                or "the bundled tasks come from the Hub; for local data write a task file (docs/evaluation.md)",
            ) from error
        for task_name, task in found["tasks"].items():
            if task_name in owners:
                raise UsageError(f"task {task_name} is asked for twice: by {owners[task_name]} and by {spec}")
            owners[task_name] = spec
            _check_task(task_name, task, num_fewshot)
        loaded |= found["tasks"]
        groups |= found.get("groups") or {}
    return TaskSet(tasks, loaded, groups, num_fewshot)


def import_lm_eval() -> Any:
    """lm-eval, with its templates in Jinja's sandbox; raises MissingExtraError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.utils
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval", "running benchmark tasks") from error
    _require_sandbox(lm_eval.utils)
    return lm_eval


def _require_sandbox(utilities: Any) -> None:
    """Render tasks' templates in Jinja's sandbox: lm-eval's own environment lets a task file run any code."""
    if isinstance(utilities.env, ImmutableSandboxedEnvironment):
        return
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utilities.env.filters)
    utilities.env = sandbox


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's notes on choices that are made on purpose here; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _task_manager(tasks: list[str], include_path: Path | None, cache: Path) -> tuple[Any, list[str]]:
    """An index of all tasks, and the names of the requested ones in it.

    lm-eval's own 14,000, which take 10 s to read, are there only where one is needed.
    """
    from lm_eval.tasks import TaskManager

    own, names = _own_tasks(tasks, include_path, cache)
    with quiet_lm_eval():
        manager = TaskManager(include_defaults=False)
        if _unknown(names, own):
            manager = TaskManager()
    manager.task_index.update(own)
    unknown = _unknown(names, manager.task_index)
    if unknown:
        near = nearest(unknown[0], list(manager.task_index))
        raise UsageError(
            f"found no task named {unknown[0]!r} in lm-eval" + (f" or in {include_path}" if include_path else ""),
            hint=f"did you mean {near}?" if near else "lm-eval ls tasks lists the bundled ones",
        )
    for name in names:
        for leaf, config in _leaves(name, manager.task_index):
            if config is not None and config.get("unsafe_code"):
                raise refusal(f"task {leaf}", "runs code that the model writes")
    return manager, names


def _own_tasks(tasks: list[str], include_path: Path | None, cache: Path) -> tuple[dict[str, Any], list[str]]:
    """Task files as entries of lm-eval's index that hold their settings, and the names of the requested tasks.

    Local rows are read into memory: datasets would leave a copy of them in the home folder, which may be read-only.
    """
    from lm_eval.api import metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks._index import TaskIndex

    known_metrics = frozenset(metric_registry)
    own: dict[str, Any] = {}

    def read(path: Path) -> str:
        settings = read_task_file(path, known_metrics)
        for part in with_members(settings):
            rows = part.get("dataset_kwargs") or {}
            if "data_files" in rows:
                part["dataset_kwargs"] = {**rows, "cache_dir": str(cache), "keep_in_memory": True}
        name = str(settings.get("group", settings.get("task")))
        if name in own and own[name].cfg != settings:
            raise UsageError(f"{path} is a second task file named {name}, expected one")
        TaskIndex.process_cfg(settings, None, own)
        return name

    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"no such folder of tasks: {include_path}")
        for path in sorted(include_path.rglob("*.yaml")):
            read(path)
    return own, [read(Path(task)) if task.endswith(SUFFIXES) else task for task in tasks]


def _unknown(names: list[str], index: dict[str, Any]) -> list[str]:
    return [leaf for name in names for leaf, config in _leaves(name, index) if config is None]


def _leaves(
    name: str, index: dict[str, Any], inside: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every single task behind a name with its settings; None for a name that the index does not have."""
    entry = index.get(name)
    if name in inside:
        raise UsageError(f"the group {name} is a member of itself")
    if entry is None:
        yield name, None
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member, index, (*inside, name))
    else:
        yield from _members(entry.cfg, index, (*inside, name))


def _members(
    config: dict[str, Any], index: dict[str, Any], inside: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The single tasks of one task's or group's settings; a group names its members or defines them in place."""
    if "group" not in config:
        yield config["task"], config
        return
    for member in group_members(config):
        if isinstance(member, str):
            yield from _leaves(member, index, inside)
        elif member.get("group", member.get("task")) in index:
            yield from _leaves(member.get("group", member.get("task")), index, inside)
            yield str(member), member
        else:
            yield from _members(member, index, inside)


def _check_task(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse a loaded task that would not run with these settings, and set its number of solved examples."""
    if getattr(task, "UNSAFE_CODE", False):
        raise refusal(f"task {name}", "runs code that the model writes")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name} has images or sound, expected text alone")
    own = task.get_config("num_fewshot")
    if num_fewshot and own == 0:
        raise UsageError(
            f"task {name} is fixed at 0 solved examples, {num_fewshot} were asked for",
            hint="ask it without solved examples, apart from the others",
        )
    wanted = (own or 0) if num_fewshot is None else num_fewshot
    task.set_config("num_fewshot", wanted)
    if wanted:
        _check_examples(name, task, wanted)


def _check_examples(name: str, task: Any, wanted: int) -> None:
    """Refuse more solved examples than there are rows; where questions are among these rows, exclude the one asked.

    lm-eval excludes it only where the task names the same split for both.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UsageError(
            f"task {name} scores whole texts, which take no solved examples; {wanted} were asked for",
            hint="ask it without solved examples, apart from the others",
        )
    rows = Counter(json.dumps(row, sort_keys=True, default=str) for row in task.sampler.df)
    asked = {json.dumps(row, sort_keys=True, default=str) for row in task.eval_docs}
    shared = max((count for row, count in rows.items() if row in asked), default=0)
    if shared:
        task.fewshot_cfg.split = task.config.test_split  # equal ones are what makes lm-eval exclude the question
    found = rows.total() - shared
    if found < wanted:
        raise UsageError(
            f"task {name} has {found} rows to take solved examples from"
            + (" beside the question itself" if shared else "")
            + f", {wanted} were asked for",
            hint="ask for fewer with --num-fewshot, or give the task a fewshot_split with more rows",
        )


def first_line(error: BaseException) -> str:
    """An error in one line, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
