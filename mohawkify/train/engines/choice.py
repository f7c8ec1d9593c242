"""Which engine a run trains on, and how its global batch is shared: the same for every stage."""

from __future__ import annotations

import importlib.util
import math

import torch

from mohawkify.distributed.process_group import World
from mohawkify.errors import UsageError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.objectives.objective import Objective
from mohawkify.recipe.schema import ComputeRecipe, Recipe, StageRecipe
from mohawkify.train.engines.deepspeed_config import EngineFacts, engine_config, read_settings, zero_and_offload
from mohawkify.train.engines.engine import Engine, LocalEngine

FOLLOWING_MICRO_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def choose_engine(compute: ComputeRecipe, world: World) -> str:
    """``single``, ``deepspeed`` or ``fsdp``.

    Raises:
        MohawkifyError: the engine does not work in so many processes, or it would ignore some of the settings.
    """
    engine: str = compute.engine
    if engine == "auto":
        several = "deepspeed" if importlib.util.find_spec("deepspeed") else "fsdp"
        engine = "single" if world.size == 1 else several
    elif engine == "single" and world.size > 1:
        raise UsageError(
            f"the engine single works in one process, found {world.size}", hint="choose --engine deepspeed or fsdp"
        )
    else:
        for key, value in ignored_settings(compute, engine).items():
            raise UsageError(
                f"found compute.{key} {value}, which the engine {engine} ignores",
                hint=f"choose --engine deepspeed, or leave it out with --set compute.{key}=null",
            )
    if engine == "fsdp" and compute.offload == "optimizer":
        raise UsageError("the engine fsdp offloads none or all, found compute.offload optimizer")
    if engine == "deepspeed":
        zero_and_offload(compute.zero, compute.offload, read_settings(compute.deepspeed_config))
    return engine


def ignored_settings(compute: ComputeRecipe, engine: str) -> dict[str, int | str]:
    """The settings of engines that are given and that this engine ignores, by their keys."""
    used = {"single": (), "fsdp": ("offload",), "deepspeed": ("zero", "deepspeed_config", "offload")}[engine]
    given = {"zero": compute.zero, "deepspeed_config": compute.deepspeed_config, "offload": compute.offload}
    return {key: value for key, value in given.items() if value not in (None, "none") and key not in used}


def require_even_shares(recipe: Recipe, world: World) -> None:
    """Raise UsageError if the processes cannot share a stage's batch evenly: its size is never changed."""
    batches = {name: stage.batch_sequences for name, stage in recipe.stages.blocks().items() if stage.num_steps}
    common = math.gcd(*batches.values())
    for name, batch_sequences in batches.items():
        if batch_sequences % world.size:
            divisors = [str(number) for number in range(1, common + 1) if common % number == 0]
            raise UsageError(
                f"{world.size} processes cannot share the {batch_sequences} sequences of a batch of stage {name}",
                hint=f"start {', '.join(divisors[-8:])} processes, which divides the batches of all stages, or change"
                f" stages.{name}.batch_sequences",
            )


def build_engine(objective: Objective, recipe: Recipe, micro_batch: int, device: torch.device, world: World) -> Engine:
    """Put the student into the recipe's engine, for a stage.

    Args:
        objective: of the stage; has the student and the parameters that train.
        recipe: engine, optimiser and precision.
        micro_batch: sequences per forward pass in one process.

    Raises:
        MohawkifyError: the engine is not installed, or its settings contradict the recipe.
    """
    models, compute = objective.models, recipe.compute
    name = choose_engine(compute, world)
    common = (models.student, objective.parameters(), recipe.optimizer, compute.precision, device)
    if name == "single":
        return LocalEngine(*common)
    layers = find_layers(models.student, models.spec.layers)
    if name == "fsdp":
        from mohawkify.train.engines.fsdp_engine import FsdpEngine, FsdpSettings

        return FsdpEngine(*common, FsdpSettings(world, layers, compute.offload == "all"))
    from mohawkify.train.engines.deepspeed_engine import DeepSpeedEngine, ZeroSettings

    config = _deepspeed_settings(objective.block, recipe, micro_batch, world, read_settings(compute.deepspeed_config))
    num_passes = -(-objective.block.batch_sequences // world.size // micro_batch)
    backwards = num_passes if objective.has_one_backward else None
    return DeepSpeedEngine(*common, ZeroSettings(world, layers, config, backwards))


def require_agreeing_settings(recipe: Recipe, world: World) -> None:
    """Raise RecipeError if a user's DeepSpeed settings contradict any stage, before the first one begins."""
    if recipe.compute.deepspeed_config is None or choose_engine(recipe.compute, world) != "deepspeed":
        return
    settings = read_settings(recipe.compute.deepspeed_config)
    requested = recipe.compute.micro_batch_sequences
    if requested == "auto":  # the size is found when a stage begins, and compared then
        settings = {key: value for key, value in settings.items() if key not in FOLLOWING_MICRO_BATCH}
    for stage in recipe.stages.blocks().values():
        share = stage.batch_sequences // world.size
        if stage.num_steps and stage.learning_rate is not None:
            micro_batch = min(requested, share) if isinstance(requested, int) else share
            _deepspeed_settings(stage, recipe, micro_batch, world, settings)


def _deepspeed_settings(
    stage: StageRecipe, recipe: Recipe, micro_batch: int, world: World, settings: dict[str, object]
) -> dict[str, object]:
    """The settings that DeepSpeed is started with for a stage."""
    compute = recipe.compute
    facts = EngineFacts(
        optimizer=recipe.optimizer,
        learning_rate=stage.learning_rate,
        precision=compute.precision,
        batch_sequences=stage.batch_sequences,
        micro_batch_sequences=micro_batch,
        num_processes=world.size,
        zero=compute.zero,
        offload=compute.offload,
    )
    return engine_config(facts, settings, compute.deepspeed_config or "")
