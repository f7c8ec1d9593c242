"""What is said where memory runs out: which setting takes less of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
import torch

from mohawkify.distributed.process_group import World
from mohawkify.errors import MEMORY, MemoryShortageError, is_out_of_memory
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.train.loop import Stage
from mohawkify.train.micro_batch import naming_what_to_try
from tests.commands import RECIPE


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_known_by_all_its_names(error, is_memory):
    assert is_out_of_memory(error) == is_memory


@pytest.mark.parametrize(
    ("rows", "processes", "micro_batch", "more", "says"),
    [
        (48, 1, 48, (), "--set compute.micro_batch_sequences=24"),
        (48, 1, 16, (), "--set compute.micro_batch_sequences=12"),
        (48, 4, 12, (), "--set compute.micro_batch_sequences=6"),
        (4, 1, 3, (), "--set compute.micro_batch_sequences=2"),
        (4, 1, 1, (), "--set compute.activation_checkpointing=true"),
        (4, 1, 1, ("compute.activation_checkpointing=true",), "more processes or compute.offload"),
    ],
)
def test_the_next_smaller_micro_batch_is_named(rows, processes, micro_batch, more, says):
    changes = [f"stages.align.batch_sequences={rows}", f"stages.align.tokens={rows * 16}", *more]
    recipe = apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), changes)
    with (
        pytest.raises(MemoryShortageError) as found,
        naming(recipe, micro_batch, World(0, processes)),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
    assert found.value.exit_code == MEMORY
    assert f"out of memory in stage align with a micro-batch of {micro_batch}: Tried" in found.value.message
    assert str(found.value.hint).endswith(says)


def naming(recipe: Recipe, micro_batch: int, world: World) -> AbstractContextManager[None]:
    stage = Stage("align", SimpleNamespace(block=recipe.stages.align), [])  # type: ignore[arg-type]
    return naming_what_to_try(SimpleNamespace(recipe=recipe, world=world), stage, micro_batch)  # type: ignore[arg-type]


def test_other_errors_are_left_alone():
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    with pytest.raises(ValueError, match="x"), naming(recipe, 2, World()):
        raise ValueError("x")
