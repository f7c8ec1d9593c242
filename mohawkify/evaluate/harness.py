"""Benchmark tasks through lm-eval, for teacher and student in the same run. The only module that imports lm_eval."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.errors import DataError, MissingExtraError, MohawkifyError, NumericsError, UsageError
from mohawkify.evaluate.agreement import evaluating
from mohawkify.shelf import nearest

# lm-eval's own defaults, said here so that a result can be repeated with another version.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
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


def run_preset(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    batch_size: int,
    limit: int | None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Run a published set of tasks; the arguments are those of `run_tasks`.

    Returns:
        What `run_tasks` returns, and ``preset``: its ``name``, its ``metrics`` and their ``average`` for every model.

    Raises:
        UsageError: there is no such preset; and what `run_tasks` raises.
    """
    if name not in PRESETS:
        raise UsageError(f"found no preset named {name!r}, expected one of: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    outcome = run_tasks(
        models,
        tokenizer,
        list(preset.metrics),
        batch_size=batch_size,
        limit=limit,
        num_fewshot=preset.num_fewshot,
        include_path=include_path,
    )
    figures = [outcome["tasks"][task]["metrics"][metric] for task, metric in preset.metrics.items()]
    average = {model: sum(each[model] for each in figures) / len(figures) for model in models}
    average |= _retention(average, higher_is_better=True)
    return {**outcome, "preset": {"name": name, "metrics": preset.metrics, "average": average}}


def run_tasks(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Score models on the same questions with the same settings.

    Every task is found, checked and loaded before the first question is asked.

    Args:
        models: by name; ``teacher`` and ``student`` are compared with each other.
        tokenizer: of all the models; not changed.
        tasks: names of lm-eval's tasks, groups or tags, of those in include_path, or paths of YAML files.
        batch_size: questions per forward pass.
        limit: how many questions of each task, from its start; None for all.
        num_fewshot: solved examples in front of every question; None for what each task says, which is mostly 0.
        include_path: a folder with more task files.

    Returns:
        A dictionary for results.json: ``lm_eval`` (its version), ``num_fewshot``, ``limit``, ``batch_size``, ``seeds``,
        ``window`` (tokens), ``truncated_requests``, ``tasks`` and ``subtasks`` (the members of groups). Each task has
        ``version``, ``num_fewshot``, ``samples`` and ``metrics``; each metric has ``higher_is_better``, a value per
        model, and ``retention``: 100 x student / teacher, or 100 x teacher / student where lower is better.

    Raises:
        MissingExtraError: lm-eval is not installed.
        UsageError: an unknown task, or one that would run code or cannot be run as asked.
        DataError: a task's questions cannot be read, or do not fit the models' window.
        NumericsError: a metric is not finite.
    """
    lm_eval = _import_lm_eval()
    loaded = _load_tasks(tasks, num_fewshot, include_path)
    scores, language_models = {}, {}
    with evaluating(*models.values()), _quiet_lm_eval():
        for name, model in models.items():
            language_models[name] = _language_model(model, tokenizer, batch_size)
        window = _common_window({name: each.max_length for name, each in language_models.items()})
        for name, language_model in language_models.items():
            scores[name] = _evaluate(language_model, loaded, limit, num_fewshot)
    return {
        "lm_eval": lm_eval.__version__,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "seeds": SEEDS,
        "window": window,
        "truncated_requests": max(each.truncated_requests for each in language_models.values()),
        **_compare(scores),
    }


def _import_lm_eval() -> Any:
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
def _quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's notes on choices that are made on purpose here; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_tasks(tasks: list[str], num_fewshot: int | None, include_path: Path | None) -> list[Any]:
    """Find, check and load tasks: lm-eval's Task and Group objects with their questions."""
    if not tasks:
        raise UsageError("no task is named, expected at least one", hint="lm-eval ls tasks lists the bundled ones")
    files = {task: _check_task_file(Path(task)) for task in tasks if task.endswith(_SUFFIXES)}
    manager = _task_manager(tasks, files, include_path)
    loaded: list[Any] = []
    owners: dict[str, str] = {}
    for spec in tasks:
        try:
            with _quiet_lm_eval():
                found = manager.load(spec)
        except Exception as error:  # whatever lm-eval, datasets, Jinja or the network make of somebody's task
            raise DataError(
                f"the questions of task {spec} cannot be loaded: {_first_line(error)}",
                hint="the bundled tasks come from the Hub; for local data write a task file (docs/evaluation.md)",
            ) from error
        for name, task in found["tasks"].items():
            if name in owners:
                raise UsageError(f"task {name} is asked for twice: by {owners[name]} and by {spec}")
            owners[name] = spec
            _check_task(name, task, num_fewshot)
        groups = list((found.get("groups") or {}).values())
        loaded += groups[:1] or list(found["tasks"].values())  # the first group is the one asked for
    return loaded


def _task_manager(tasks: list[str], files: dict[str, dict[str, Any]], include_path: Path | None) -> Any:
    """An index that knows every task; lm-eval's own 14,000, which take 10 s to read, only where one is needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"no such folder of tasks: {include_path}")
        for path in sorted(include_path.rglob("*.yaml")):
            _check_task_file(path)
    include = str(include_path) if include_path is not None else None
    with _quiet_lm_eval():
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
        raise UsageError(f"{path} is not YAML: {_first_line(error)}") from error
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


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class CheckedLM(HFLM):
        """Says what does not fit the window before the first forward pass; lm-eval alone stops half-way, wordless."""

        truncated_requests = 0

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            for (_, continuation), context_ids, continuation_ids in requests:
                if len(continuation_ids) > self.max_length:
                    raise DataError(
                        f"an answer of {len(continuation_ids)} tokens does not fit the models' window of "
                        f"{self.max_length}: {continuation.strip()[:60]!r}...",
                        hint="leave out that task, or set a --limit below that question",
                    )
                # The last token is only predicted, so one more than the window fits.
                self.truncated_requests += len(context_ids) + len(continuation_ids) > self.max_length + 1
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    # The tokenizer is copied because lm-eval gives it a padding token.
    return CheckedLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _common_window(windows: dict[str, int]) -> int:
    if len(set(windows.values())) > 1:
        shown = ", ".join(f"{name} {window}" for name, window in windows.items())
        raise UsageError(
            f"the models see windows of different lengths ({shown}), so they would answer different questions",
            hint="give them the same max_position_embeddings in config.json",
        )
    return next(iter(windows.values()))


def _evaluate(language_model: Any, tasks: list[Any], limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        return simple_evaluate(
            model=language_model,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),
            **SEEDS,
        )
    except MohawkifyError:
        raise
    except AssertionError as error:  # lm-eval's way to refuse questions that do not fit the model
        raise DataError(f"lm-eval refuses the questions: {_first_line(error)}") from error


def _compare(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the models' figures side by side, tasks that were asked for apart from the members of groups."""
    facts = next(iter(scores.values()))
    inside = {child for children in facts["group_subtasks"].values() for child in children}
    compared: dict[str, Any] = {"tasks": {}, "subtasks": {}}
    for name in facts["results"]:
        samples = facts["n-samples"].get(name)
        compared["subtasks" if name in inside else "tasks"][name] = {
            "version": facts["versions"].get(name),
            "num_fewshot": facts["n-shot"].get(name),
            "samples": samples["effective"] if samples else None,
            "metrics": _metrics(name, scores, facts["higher_is_better"].get(name, {})),
        }
    return compared


def _metrics(task: str, scores: dict[str, dict[str, Any]], directions: dict[str, bool]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for key in next(iter(scores.values()))["results"][task]:
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = {model: float(score["results"][task][key]) for model, score in scores.items()}
        for model, value in values.items():
            if not math.isfinite(value):
                raise NumericsError(f"{metric} of the {model} on {task} is {value}, expected a number")
        direction = directions.get(metric)
        label = metric if answer_filter == "none" else key
        metrics[label] = {"higher_is_better": direction, **values, **_retention(values, higher_is_better=direction)}
    return metrics


def _retention(values: dict[str, float], *, higher_is_better: bool | None) -> dict[str, float | None]:
    """The share of the teacher's quality that the student keeps, in percent; None where a ratio says nothing."""
    if not {"teacher", "student"} <= values.keys():
        return {}
    over, under = values["student"], values["teacher"]
    if higher_is_better is False:
        over, under = under, over
    meaningful = higher_is_better is not None and over >= 0 and under > 0
    return {"retention": 100.0 * over / under if meaningful else None}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
