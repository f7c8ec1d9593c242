"""How many sequences go through the models at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mohawkify.data.loader import batch_at
from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.errors import MemoryShortageError, is_out_of_memory
from mohawkify.objectives.objective import Objective, Runner
from mohawkify.train.conversion import Conversion
from mohawkify.train.engines.engine import Engine
from mohawkify.train.loop import Stage

_MOMENT_BYTES = 8  # that AdamW allocates for a weight in the first step


def micro_batch_of(conversion: Conversion, stage: Stage, make_engine: Callable[[int], Engine]) -> int:
    """The sequences per forward pass in one process.

    Args:
        conversion: the recipe has a number, or ``auto``: the largest that fits, by halving; without a GPU all.
        stage: what is trained.
        make_engine: puts the student into an engine that expects so many.

    Raises:
        MemoryShortageError: a single sequence does not fit.
    """
    recipe, world, device = conversion.recipe, conversion.world, conversion.device
    rows = stage.objective.block.batch_sequences // world.size
    setting = recipe.compute.micro_batch_sequences
    if setting is None or isinstance(setting, int):
        return min(setting or rows, rows)
    if device.type != "cuda":
        return rows
    longest = max(stage.ranges, key=lambda sample_range: sample_range.sequence_length)
    batch = batch_at([longest], 0, stage.objective.block.batch_sequences, recipe.seed)
    with naming_what_to_try(conversion, stage, 1):
        part = Batch(*(tensor[:rows] for tensor in batch))
        return largest_that_fits(stage.objective, part, world, device, make_engine)


@contextmanager
def naming_what_to_try(conversion: Conversion, stage: Stage, micro_batch: int) -> Iterator[None]:
    """Where memory runs out within the block, name the setting that needs less of it.

    Args:
        conversion: recipe and processes.
        stage: what is trained.
        micro_batch: the sequences per forward pass in one process.

    Raises:
        MemoryShortageError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = stage.objective.block.batch_sequences // conversion.world.size
        smaller = [number for number in range(1, micro_batch) if rows % number == 0]
        if smaller:
            what = f"--set compute.micro_batch_sequences={smaller[-1]}"
        elif not conversion.recipe.compute.activation_checkpointing:
            what = "--set compute.activation_checkpointing=true"
        else:
            what = "more processes or compute.offload"
        raise MemoryShortageError(
            f"out of memory in stage {stage.name} with a micro-batch of {micro_batch}: {error}",
            hint=f"the newest checkpoint is intact and the same command continues it; let it try {what}",
        ) from error


def largest_that_fits(
    objective: Objective, batch: Batch, world: World, device: torch.device, make_engine: Callable[[int], Engine]
) -> int:
    """Try forward and backward passes, each time with half the sequences, until no process runs out of memory.

    Nothing is learned, and the random generators are as they were.

    Raises:
        torch.OutOfMemoryError: a single sequence does not fit.
    """
    micro_batch = len(batch.input_ids)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        while True:
            error = _try(
                objective, Batch(*(tensor[:micro_batch] for tensor in batch)), device, make_engine(micro_batch)
            )
            if not world.max(float(error is not None)):
                return micro_batch
            if micro_batch == 1:
                raise error or torch.OutOfMemoryError("a sequence does not fit in another process")
            micro_batch //= 2


def _try(objective: Objective, batch: Batch, device: torch.device, engine: Engine) -> Exception | None:
    """Run passes over some sequences, with as much memory allocated as the optimizer will need."""
    try:
        with engine.accumulating():
            num_weights = sum(engine.shard(name).numel() for name in objective.parameters())
            taken = torch.empty(num_weights * _MOMENT_BYTES, dtype=torch.uint8, device=device)
            with engine.autocast():
                objective.run(Batch(*(tensor.to(device) for tensor in batch)), Runner(engine.backward, engine.call))
            del taken
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # its frames hold the activations
    finally:
        engine.close()
        for parameter in objective.parameters().values():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None
