"""Spreads a teacher over the processes, if it does not fit on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from mohawkify.distributed.process_group import World, require_group
from mohawkify.families.decoder_layers import find_layers
from mohawkify.train.engines.deepspeed_engine import import_deepspeed, join_deepspeed

How = Literal["deepspeed", "fsdp"]


def shard_teacher(teacher: PreTrainedModel, layers: str, how: How, device: torch.device, world: World) -> None:
    """Spread a frozen teacher's trunk over the processes, by ZeRO-3 without an optimiser or by FSDP2.

    It is called as before, by its trunk or whole, by all processes alike. The head stays whole in every process, and
    so does the embedding where it is the head: losses read its weight directly.

    Args:
        teacher: the frozen teacher, whole in every process with the same values; it may lie in the CPU's memory.
        layers: the attribute path of its decoder layers.
    """
    require_group()
    head = teacher.get_output_embeddings()
    whole = set() if head is None else set(head.parameters())
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    if how == "fsdp":
        _shard_by_fsdp(teacher, layers, whole, device, world)
    else:
        _shard_by_deepspeed(teacher, whole, device, world)


def _shard_by_fsdp(
    teacher: PreTrainedModel, layers: str, whole: set[nn.Parameter], device: torch.device, world: World
) -> None:
    trunk: Any = teacher.base_model
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "reshard_after_forward": True,
        "ignored_params": whole,
    }
    for layer in find_layers(teacher, layers):
        fully_shard(layer, **settings)
    fully_shard(trunk, **settings)

    def reset_order(*_: Any) -> None:
        # FSDP2 records the order of all forward passes for a backward pass, which a teacher never has.
        if hasattr(trunk, "reset_iter_state"):
            trunk.reset_iter_state()

    trunk.register_forward_hook(reset_order)


def _shard_by_deepspeed(teacher: PreTrainedModel, whole: set[nn.Parameter], device: torch.device, world: World) -> None:
    deepspeed = import_deepspeed(device)
    join_deepspeed(deepspeed, world)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    trunk = teacher.base_model
    with _hidden_from_deepspeed(trunk, whole):
        deepspeed.initialize(model=trunk, config=config, dist_init_required=False)


@contextmanager
def _hidden_from_deepspeed(trunk: nn.Module, whole: set[nn.Parameter]) -> Iterator[None]:
    """Within the block the trunk is without the modules that own these parameters, so that they are left alone."""
    hidden = [
        (parent, name, child)
        for parent in trunk.modules()
        for name, child in parent.named_children()
        if any(parameter in whole for parameter in child.parameters(recurse=False))
    ]
    for parent, name, _ in hidden:
        parent._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for parent, name, child in hidden:
            parent._modules[name] = child
