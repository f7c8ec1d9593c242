"""Benchmark tasks of lm-eval: teacher and student get the same requests with the same settings."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.errors import DataError, MohawkifyError, NumericsError, UsageError
from mohawkify.evaluation.fidelity import evaluating
from mohawkify.evaluation.harness_tasks import PRESETS, TaskSet, first_line, import_lm_eval, quiet_lm_eval
from mohawkify.evaluation.response_cache import ResponseCache

# lm-eval's own defaults, fixed here so that a result can be repeated with another version.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


def run_tasks(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    *,
    batch_size: int,
    limit: int | None,
    responses: Mapping[str, ResponseCache] | None = None,
) -> dict[str, Any]:
    """Score models on the same tasks with the same settings.

    Args:
        models: by name; ``teacher`` and ``student`` are compared with each other.
        tokenizer: of all the models; not changed.
        tasks: from `load_tasks` or `load_preset`.
        batch_size: questions per forward pass.
        limit: how many questions of each task, from its start; None for all.
        responses: where each model's responses are found and kept, by its name; None runs everything.

    Returns:
        A dictionary for eval.json: ``lm_eval`` (its version), ``num_fewshot``, ``limit``, ``batch_size``, ``seeds``,
        ``window`` (tokens), ``truncated_requests``, ``tasks`` and ``subtasks`` (the members of groups). Each task has
        ``version``, ``sha256`` (of all requests and the rows they were made of), ``num_fewshot``, ``samples`` and
        ``metrics``; each metric has ``higher_is_better``, a value per model, and ``retention``: 100 x student /
        teacher, or 100 x teacher / student where lower is better. A preset has its ``name``, its ``metrics`` and their
        ``average`` for every model under ``preset``.

    Raises:
        DataError: questions do not fit the models' window.
        NumericsError: a metric is not finite.
        UsageError: the models have windows of different lengths.
    """
    from mohawkify.evaluation.harness_model import CheckedLM

    scores = {}
    with evaluating(*models.values()), quiet_lm_eval():
        language_models = {
            name: CheckedLM(model, tokenizer, batch_size, (responses or {}).get(name)) for name, model in models.items()
        }
        window = _common_window({name: each.max_length for name, each in language_models.items()})
        for name, language_model in language_models.items():
            scores[name] = _evaluate(language_model, tasks, limit)
    outcome = {
        "lm_eval": import_lm_eval().__version__,
        "num_fewshot": tasks.num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "seeds": SEEDS,
        "window": window,
        "truncated_requests": max(each.truncated_requests for each in language_models.values()),
        **_compare(scores, {name: _sha256(task) for name, task in tasks.tasks.items()}),
    }
    return outcome if tasks.preset is None else {**outcome, "preset": _average(tasks.preset, outcome, models)}


def _average(name: str, outcome: dict[str, Any], models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    metrics = PRESETS[name].metrics
    scores = [outcome["tasks"][task]["metrics"][metric] for task, metric in metrics.items()]
    average = {model: sum(each[model] for each in scores) / len(scores) for model in models}
    average |= _retention(average, higher_is_better=True)
    return {"name": name, "metrics": metrics, "average": average}


def _sha256(task: Any) -> str:
    """Hash a task's requests, with the rows they were made of, which hold the right answers too."""
    digest = hashlib.sha256()
    for instance in task.instances:
        request = [instance.request_type, instance.args, instance.doc]
        digest.update(json.dumps(request, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _common_window(windows: dict[str, int]) -> int:
    if len(set(windows.values())) > 1:
        shown = ", ".join(f"{name} {window}" for name, window in windows.items())
        raise UsageError(
            f"the models see windows of different lengths ({shown}), so they would get different requests",
            hint="give them the same max_position_embeddings in config.json",
        )
    return next(iter(windows.values()))


def _evaluate(language_model: Any, tasks: TaskSet, limit: int | None) -> dict[str, Any]:
    """Run the tasks; lm-eval's simple_evaluate would also start pip and git."""
    from lm_eval.evaluator import evaluate

    random.seed(SEEDS["random_seed"])
    numpy.random.seed(SEEDS["numpy_random_seed"])
    torch.manual_seed(SEEDS["torch_random_seed"])
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=SEEDS["fewshot_random_seed"])
    try:
        return evaluate(
            lm=language_model,
            task_dict={"tasks": tasks.tasks, "groups": tasks.groups},
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (MohawkifyError, MemoryError, RuntimeError):  # ours, and those of the models
        raise
    except Exception as error:  # lm-eval and Jinja raise anything on a broken task
        raise DataError(f"lm-eval cannot run the tasks: {first_line(error)}") from error


def _compare(scores: dict[str, dict[str, Any]], hashes: dict[str, str]) -> dict[str, Any]:
    """Put the models' metrics side by side, requested tasks apart from the members of groups."""
    facts = next(iter(scores.values()))
    inside = {child for children in facts["group_subtasks"].values() for child in children}
    compared: dict[str, Any] = {"tasks": {}, "subtasks": {}}
    for name in facts["results"]:
        samples = facts["n-samples"].get(name)
        compared["subtasks" if name in inside else "tasks"][name] = {
            "version": facts["versions"].get(name),
            **({"sha256": hashes[name]} if name in hashes else {}),  # a group has none, its members do
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
    """The share of the teacher's quality that the student keeps, in percent; None where a ratio has no meaning."""
    if not {"teacher", "student"} <= values.keys():
        return {}
    over, under = values["student"], values["teacher"]
    if higher_is_better is False:
        over, under = under, over
    meaningful = higher_is_better is not None and over >= 0 and under > 0
    return {"retention": 100.0 * over / under if meaningful else None}
