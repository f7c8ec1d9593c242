"""The tasks of lm-eval: found, checked and loaded with their questions before a model is. Task files are plain data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mohawkify.errors import DataError, MissingExtraError, UsageError
from mohawkify.shelf import nearest

_SUFFIXES = (".yaml", ".yml")
# Keys of a task file that make lm-eval import code, run a model's output, or read templates that nobody checked.
_CODE_KEYS = ("class", "unsafe_code", "use_prompt")


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
class Questions:
    """Tasks of lm-eval with their questions, checked and ready to be put to models.

    Args:
        names: what was asked for: tasks, groups, tags or files.
        entries: lm-eval's Task and Group objects for them, in that order.
        tasks: every single task by name, the members of groups included.
        num_fewshot: solved examples in front of every question; None for what each task says, which is mostly 0.
        preset: the published set that they are; None where they were named one by one.
    """

    names: list[str]
    entries: list[Any]
    tasks: dict[str, Any]
    num_fewshot: int | None
    preset: str | None = None


def load_preset(name: str, include_path: Path | None = None) -> Questions:
    """Load a published set of tasks; raises what `load_questions` raises, and UsageError where there is no such set."""
    if name not in PRESETS:
        raise UsageError(f"found no preset named {name!r}, expected one of: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return replace(load_questions(list(preset.metrics), preset.num_fewshot, include_path), preset=name)


def load_questions(tasks: list[str], num_fewshot: int | None = None, include_path: Path | None = None) -> Questions:
    """Find, check and load tasks; no model is needed, and nothing that a task file names is run.

    Args:
        tasks: names of lm-eval's tasks, groups or tags, of those in include_path, or paths of YAML files.
        num_fewshot: solved examples in front of every question; None for what each task says.
        include_path: a folder with more task files.

    Raises:
        MissingExtraError: lm-eval is not installed.
        UsageError: an unknown task, or one that would run code or cannot be run as asked.
        DataError: a task's questions cannot be read.
    """
    import_lm_eval()
    if not tasks:
        raise UsageError("no task is named, expected at least one", hint="lm-eval ls tasks lists the bundled ones")
    files = {task: _check_task_file(Path(task)) for task in tasks if task.endswith(_SUFFIXES)}
    manager = _task_manager(tasks, files, include_path)
    entries: list[Any] = []
    owners: dict[str, str] = {}
    loaded: dict[str, Any] = {}
    for spec in tasks:
        try:
            with quiet_lm_eval():
                found = manager.load(spec)
        except Exception as error:  # whatever lm-eval, datasets, Jinja or the network make of somebody's task
            raise DataError(
                f"the questions of task {spec} cannot be loaded: {first_line(error)}",
                hint="the bundled tasks come from the Hub; for local data write a task file (docs/evaluation.md)",
            ) from error
        for name, task in found["tasks"].items():
            if name in owners:
                raise UsageError(f"task {name} is asked for twice: by {owners[name]} and by {spec}")
            owners[name] = spec
            _check_task(name, task, num_fewshot)
        loaded |= found["tasks"]
        groups = list((found.get("groups") or {}).values())
        entries += groups[:1] or list(found["tasks"].values())  # the first group is the one asked for
    return Questions(tasks, entries, loaded, num_fewshot)


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


def _task_manager(tasks: list[str], files: dict[str, dict[str, Any]], include_path: Path | None) -> Any:
    """An index that knows every task; lm-eval's own 14,000, which take 10 s to read, only where one is needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"no such folder of tasks: {include_path}")
        for path in sorted(include_path.rglob("*.yaml")):
            _check_task_file(path)
    include = str(include_path) if include_path is not None else None
    with quiet_lm_eval():
        manager = TaskManager(include_path=include, include_defaults=False)
        if _unknown(tasks, files, manager.task_index):
            manager = TaskManager(include_path=include)
    unknown = _unknown(tasks, files, manager.task_index)
    if unknown:
        near = nearest(unknown[0], manager.all_tasks)
        raise UsageError(
            f"found no task named {unknown[0]!r} in lm-eval" + (f" or in {include}" if include else ""),
            hint=f"did you mean {near}?" if near else "lm-eval ls tasks lists the bundled ones",
        )
    for task in tasks:
        for name, config in _leaves(task, files, manager.task_index):
            if config is not None and config.get("unsafe_code"):
                raise _refusal(f"task {name}", "runs code that the model writes")
    return manager


def _unknown(tasks: list[str], files: dict[str, dict[str, Any]], index: dict[str, Any]) -> list[str]:
    return [name for task in tasks for name, config in _leaves(task, files, index) if config is None]


def _leaves(
    task: str, files: dict[str, dict[str, Any]], index: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every single task behind a name or file with its settings; None for a name that the index does not have."""
    entry = index.get(task)
    if task in files:
        yield from _members(files[task], files, index)
    elif entry is None:
        yield task, None
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member, files, index)
    else:
        yield from _members(entry.cfg, files, index)


def _members(
    config: dict[str, Any], files: dict[str, dict[str, Any]], index: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The single tasks of one task's or group's settings; a group names its members or defines them in place."""
    if "group" not in config:
        yield config["task"], config
        return
    for member in _group_list(config):
        if isinstance(member, str):
            yield from _leaves(member, files, index)
        elif member.get("group", member.get("task")) in index:
            yield from _leaves(member.get("group", member.get("task")), files, index)
            yield str(member), member
        else:
            yield from _members(member, files, index)


def _check_task_file(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a task file as plain data with the files it includes, and refuse what would make lm-eval run code."""
    if path.resolve() in including:
        raise UsageError(f"{path} includes itself")
    try:
        data = path.read_bytes()
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise _refusal(str(path), f"has the tag {tag}")
        config = yaml.safe_load(data)
    except OSError as error:
        raise UsageError(f"the task file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds {type(config).__name__}, expected the settings of a task")
    merged: dict[str, Any] = {}
    includes = config.pop("include", [])
    for included in includes if isinstance(includes, list) else [includes]:
        merged |= _check_task_file(path.parent / str(included), (*including, path.resolve()))
    merged |= config
    for settings in _settings(config):
        _check_settings(path, settings)
    if not including and not isinstance(merged.get("group", merged.get("task")), str):
        raise UsageError(f"{path} has neither a task: nor a group: name, expected one")
    return merged


def _settings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a file and of the tasks that a group defines in place."""
    yield config
    for member in _group_list(config):
        if isinstance(member, dict):
            yield from _settings(member)


def _group_list(config: dict[str, Any]) -> list[Any]:
    """What the settings of a group list under ``task``: names of members, or their settings."""
    members = config.get("task")
    return members if isinstance(members, list) else []


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    from lm_eval.api import metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    for key in _CODE_KEYS:
        if settings.get(key):
            raise _refusal(str(path), f"has the key {key}")
    for member in _group_list(settings):
        named = isinstance(member, dict) and isinstance(member.get("group", member.get("task")), str)
        if not named and not isinstance(member, str):
            raise UsageError(f"{path} lists {member!r} in a group, expected a name or settings with a task: name")
    for metric in settings.get("metric_list") or []:
        known = isinstance(metric, dict) and str(metric.get("metric")) in metric_registry
        if not known or metric.get("hf_evaluate"):
            raise _refusal(str(path), f"has the metric {metric}, which lm-eval does not have and would fetch")


def _refusal(what: str, why: str) -> UsageError:
    return UsageError(
        f"{what} {why}; a task must be plain data here",
        hint="run such a task with lm-eval itself, on an exported student, if you trust it",
    )


def _check_task(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse a loaded task that would not run as asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise _refusal(f"task {name}", "runs code that the model writes")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name} has images or sound, expected text alone")
    if num_fewshot and task.get_config("num_fewshot") == 0:
        raise UsageError(
            f"task {name} is fixed at 0 solved examples, {num_fewshot} were asked for",
            hint="ask it without solved examples, apart from the others",
        )


def first_line(error: BaseException) -> str:
    """An error in one line, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
