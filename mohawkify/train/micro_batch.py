"""How many sequences go through the models at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mohawkify.data.loader import SampleRange, batch_at
from mohawkify.data.packing import Batch
from mohawkify.data.stage_text import stage_recipes
from mohawkify.distributed.process_group import World
from mohawkify.errors import MemoryShortageError, is_out_of_memory
from mohawkify.objectives.objective import Runner, Stage
from mohawkify.recipe.schema import Recipe
from mohawkify.train.engines.engine import Engine

_MOMENT_BYTES = 8  # what AdamW keeps of a weight, and has not yet taken before the first step


def micro_batch_of(
    stage: Stage,
    recipe: Recipe,
    ranges: list[SampleRange],
    world: World,
    device: torch.device,
    make_engine: Callable[[int], Engine],
) -> int:
    """The sequences per forward pass in one process.

    Args:
        stage: what is computed.
        recipe: says a number, or ``auto``: the largest that fits, half by half; without a GPU all.
        ranges: what the stage reads.
        world: the processes.
        device: where they compute.
        make_engine: puts the student into an engine that expects so many.

    Raises:
        MemoryShortageError: a single sequence does not fit.
    """
    stage_recipe = stage_recipes(recipe)[stage.name]
    rows = stage_recipe.batch_sequences // world.size
    wanted = recipe.compute.micro_batch_sequences
    if wanted is None or isinstance(wanted, int):
        return min(wanted or rows, rows)
    if device.type != "cuda":
        return rows
    longest = max(ranges, key=lambda sample_range: sample_range.sequence_length)
    batch = batch_at([longest], 0, stage_recipe.batch_sequences, recipe.seed)
    with naming_what_to_try(stage.name, recipe, world, 1):
        return largest_that_fits(stage, Batch(*(tensor[:rows] for tensor in batch)), world, device, make_engine)


@contextmanager
def naming_what_to_try(stage: str, recipe: Recipe, world: World, micro_batch: int) -> Iterator[None]:
    """Where memory runs out within the block, say which setting takes less of it.

    Args:
        stage: its name.
        recipe: what the run does.
        world: the processes.
        micro_batch: the sequences per forward pass in one process.

    Raises:
        MemoryShortageError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = stage_recipes(recipe)[stage].batch_sequences // world.size
        smaller = [number for number in range(1, micro_batch) if rows % number == 0]
        if smaller:
            what = f"--set compute.micro_batch_sequences={smaller[-1]}"
        elif not recipe.compute.activation_checkpointing:
            what = "--set compute.activation_checkpointing=true"
        else:
            what = "more processes or compute.offload"
        raise MemoryShortageError(
            f"out of memory in stage {stage} with a micro-batch of {micro_batch}: {error}",
            hint=f"the newest checkpoint is intact and the same command continues it; let it try {what}",
        ) from error


def largest_that_fits(
    stage: Stage, batch: Batch, world: World, device: torch.device, make_engine: Callable[[int], Engine]
) -> int:
    """Try forward and backward passes, each time with half the sequences, until no process runs out of memory.

    Nothing is learned, and the random generators are as they were.

    Raises:
        torch.OutOfMemoryError: a single sequence does not fit.
    """
    micro_batch = len(batch.input_ids)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        while True:
            error = _try(stage, Batch(*(tensor[:micro_batch] for tensor in batch)), device, make_engine(micro_batch))
            if not world.max(float(error is not None)):
                return micro_batch
            if micro_batch == 1:
                raise error or torch.OutOfMemoryError("a sequence does not fit in another process")
            micro_batch //= 2


def _try(stage: Stage, batch: Batch, device: torch.device, engine: Engine) -> Exception | None:
    """Passes over some sequences, with the memory taken that the optimiser will need."""
    try:
        with engine.accumulating():
            numbers = sum(engine.shard(name).numel() for name in stage.parameters())
            taken = torch.empty(numbers * _MOMENT_BYTES, dtype=torch.uint8, device=device)
            with engine.autocast():
                stage.run(Batch(*(tensor.to(device) for tensor in batch)), Runner(engine.backward, engine.call))
            del taken
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # its frames hold the activations
    finally:
        engine.close()
        for parameter in stage.parameters().values():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None
