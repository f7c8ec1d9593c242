"""A recipe that nobody wrote: by the rules of rules.py, for a teacher, a budget and a machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mohawkify.distributed.device import choose_device, multiplies_bf16
from mohawkify.errors import UsageError
from mohawkify.planning.planning import PlanOptions, memory_bytes, plan
from mohawkify.planning.rules import Budget, RangeRules, RecipeRules, at
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.recipe.strict_yaml import dump_yaml
from mohawkify.recipe.types import format_count
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.teacher.teacher_spec import TeacherSpec

WEB_TEXT = {"hub": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"}  # where --data or --set name none


def automatic_recipe(
    source: str,
    budget: Budget,
    overrides: Sequence[str] = (),
    options: PlanOptions | None = None,
    fits: bool = True,
) -> Recipe:
    """Write a recipe.

    Args:
        source: the teacher: a Hub id, a folder or a config.json.
        budget: its tokens are known.
        overrides: values that stand whatever the rules say.
        options: the machine, by default this one; as many processes as it has GPUs share every batch, on a CPU too.
        fits: whether the plan's memory decides on micro-batch and recomputation, which takes a plan or several.

    Raises:
        UsageError: the tokens are too few for a step of every stage.
        RecipeError: an override does not fit.
    """
    teacher, options, rules = resolve_teacher(source), options or PlanOptions(), RecipeRules()
    machine = _Machine("cuda" if options.gpu else "cpu", options.num_gpus)
    recipe = apply_overrides(_recipe(teacher.spec, teacher.name, budget, machine, rules), tuple(overrides))
    if options.gpu is None and (device := choose_device(recipe.compute.device).type) != "cpu":
        recipe = _recipe(teacher.spec, teacher.name, budget, replace(machine, device=device), rules)
        recipe = apply_overrides(recipe, tuple(overrides))
    if not fits:
        return recipe
    own = [override for override in overrides if override.startswith("compute.")]
    return apply_overrides(_that_fits(source, recipe, options, rules), own)


@dataclass(frozen=True)
class _Machine:
    """The part of a machine that the rules look at."""

    device: str
    num_processes: int


def _recipe(teacher: TeacherSpec, name: str, budget: Budget, machine: _Machine, rules: RecipeRules) -> Recipe:
    assert budget.tokens is not None
    tokens = budget.tokens
    length, sequences = rules.batch(tokens, teacher.max_position_embeddings, machine.num_processes)
    stages = rules.stage_tokens(tokens, teacher.hidden_size)
    if stages["distill"] < length * sequences:
        least = round(length * sequences / (1 - rules.most_calibration))
        raise UsageError(f"found {tokens:,} tokens, expected at least {least:,}: a step takes {length * sequences:,}")
    num_steps = stages["distill"] // (length * sequences)
    share, fewest, most = rules.evaluation
    per_stage, closest, farthest = rules.checkpoints
    least_state, most_state = rules.state_size
    steps = {"sequence_length": length, "batch_sequences": sequences}
    tested = RangeRules().least_tokens(length * sequences)
    rates = {
        stage: "auto" if stage_tokens >= tested else rules.learning_rate(stage, teacher.hidden_size)
        for stage, stage_tokens in stages.items()
    }
    is_wide = teacher.hidden_size >= rules.narrow
    threads = _num_cores() if is_wide else 1
    within = "" if budget.seconds is None else f" in {budget.seconds:g} seconds"
    return parse_recipe(
        dump_yaml(
            {
                "name": "automatic",
                "description": f"{format_count(tokens)} tokens{within}, written by mohawkify for {name}",
                "teacher": teacher.source,
                "student": {"write": "decay", "state_size": min(max(teacher.head_dim, least_state), most_state)},
                "data": {"train": [WEB_TEXT], "epochs": None},
                "stages": {
                    stage: {
                        "tokens": format_count(stage_tokens),
                        **(rules.calibration_batch(length, machine.num_processes) if stage == "calibrate" else steps),
                        **({} if stage == "calibrate" else {"learning_rate": rates[stage]}),
                        **({"train": ["mixer"]} if stage == "align" and tokens < rules.align_mixers_to else {}),
                    }
                    for stage, stage_tokens in stages.items()
                },
                "schedule": {"decay": at(rules.decay, tokens)},
                "compute": {
                    "precision": "bf16" if is_wide and multiplies_bf16(machine.device) else "fp32",
                    **({"threads": threads} if machine.device == "cpu" else {}),
                },
                "evaluation": {
                    "tokens": min(max(tokens // share, fewest), most),
                    "sequence_length": length,
                    "every_tokens": rules.within(tokens),
                },
                "checkpoint": {"every_steps": min(max(num_steps // per_stage, closest), farthest)},
            }
        ),
        "the recipe written for it",
    )


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _that_fits(source: str, recipe: Recipe, options: PlanOptions, rules: RecipeRules) -> Recipe:
    """The recipe with the largest micro-batch for which the plan has the memory, without recomputing if it can."""
    largest = recipe.stages.distill.batch_sequences // options.num_gpus
    if options.gpu is None and choose_device(recipe.compute.device).type != "cuda":
        options = replace(options, num_gpus=1)
    memory = memory_bytes()
    for checkpointing in ("false", "true"):
        for micro in (largest // divisor for divisor in range(1, largest + 1) if largest % divisor == 0):
            settings = [f"compute.activation_checkpointing={checkpointing}", f"compute.micro_batch_sequences={micro}"]
            tried = apply_overrides(recipe, settings)
            planned = plan(source, tried, options)
            usable = planned["fit"]["usable_bytes"] if planned["fit"] else memory and memory * rules.memory
            if usable is None or planned["peak_memory_bytes"] <= usable:
                return tried
    return tried
