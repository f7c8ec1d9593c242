"""Which engine a run trains on, and how its global batch is shared: the same for every stage."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from mohawkify.data.selection import stage_recipes
from mohawkify.errors import CheckpointError, RecipeError, UsageError
from mohawkify.recipe import ComputeRecipe, Recipe
from mohawkify.stages.base import Stage
from mohawkify.storage import read_json
from mohawkify.student.grafting import find_layers
from mohawkify.train.engine import Engine, LocalEngine
from mohawkify.train.world import World


def choose_engine(compute: ComputeRecipe, world: World) -> str:
    """``single``, ``deepspeed`` or ``fsdp``.

    Raises:
        UsageError: the engine does not work in so many processes, or settings are given that it would not heed.
    """
    engine = compute.engine
    if engine == "auto":
        several = "deepspeed" if importlib.util.find_spec("deepspeed") else "fsdp"
        return "single" if world.size == 1 else several
    if engine == "single" and world.size > 1:
        raise UsageError(
            f"the engine single works in one process, found {world.size}", hint="choose --engine deepspeed or fsdp"
        )
    idle = {"zero": compute.zero, "deepspeed_config": compute.deepspeed_config} if engine != "deepspeed" else {}
    for key, value in idle.items():
        if value is not None:
            raise UsageError(f"found compute.{key} {value} for the engine {engine}, expected it for deepspeed alone")
    if engine == "fsdp" and compute.offload == "optimizer":
        raise UsageError("the engine fsdp offloads none or all, found compute.offload optimizer")
    return engine


def require_even_shares(recipe: Recipe, world: World) -> None:
    """Raise UsageError where the processes cannot share a stage's batch evenly: the batch is the recipe's, exactly."""
    for name, stage in stage_recipes(recipe).items():
        if stage.num_steps and stage.batch_sequences % world.size:
            divisors = [str(n) for n in range(1, stage.batch_sequences + 1) if stage.batch_sequences % n == 0]
            raise UsageError(
                f"{world.size} processes cannot share the {stage.batch_sequences} sequences of a batch of stage {name}",
                hint=f"start {', '.join(divisors[-8:])} processes, or change stages.{name}.batch_sequences",
            )


def build_engine(stage: Stage, recipe: Recipe, micro_batch: int, device: torch.device, world: World) -> Engine:
    """Put the student of a stage into the recipe's engine.

    Args:
        stage: knows the student and which of its parameters train.
        recipe: engine, optimiser and precision.
        micro_batch: sequences per forward pass in one process.
        device: where this process computes.
        world: the processes.

    Raises:
        MohawkifyError: the engine is not installed, or its settings contradict the recipe.
    """
    pair, compute = stage.pair, recipe.compute
    name = choose_engine(compute, world)
    common = (pair.student, stage.parameters(), recipe.optimizer, compute.precision, device)
    if name == "single":
        return LocalEngine(*common)
    layers = find_layers(pair.student, pair.spec.layers)
    if name == "fsdp":
        from mohawkify.train.fsdp_engine import FsdpEngine

        return FsdpEngine(*common, world, layers=layers, offload=compute.offload == "all")
    from mohawkify.train.deepspeed_config import EngineFacts, engine_config
    from mohawkify.train.deepspeed_engine import DeepSpeedEngine

    stage_recipe = stage_recipes(recipe)[stage.name]
    facts = EngineFacts(
        optimizer=recipe.optimizer,
        learning_rate=stage_recipe.learning_rate,
        precision=compute.precision,
        batch_sequences=stage_recipe.batch_sequences,
        micro_batch_sequences=micro_batch,
        num_processes=world.size,
        zero=compute.zero,
        offload=compute.offload,
    )
    path = compute.deepspeed_config
    config = engine_config(facts, _read_settings(path) if path else None, path or "")
    num_passes = -(-stage_recipe.batch_sequences // world.size // micro_batch)
    backwards = num_passes if stage.name == "distill" else None
    return DeepSpeedEngine(*common, world, layers=layers, config=config, backwards_per_step=backwards)


def _read_settings(path: str) -> dict[str, object]:
    """A user's DeepSpeed settings: a JSON object."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"compute.deepspeed_config: there is no file {path}")
    try:
        settings = read_json(file)
    except CheckpointError as error:
        raise RecipeError(error.message) from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} is not a JSON object")
    return settings
