"""The random generators of all processes of a run, as a checkpoint keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from mohawkify.distributed.process_group import World
from mohawkify.run.checkpoint import restore_rng, rng_tensors

# The main process's states have the names that a run of one process gives them; others have `rank-1.cpu`, `rank-1.gpu`.
_CPU, _GPU, _FIRST_GPU = "cpu", "gpu", "cuda.0"


def gather_random_state(world: World) -> dict[str, Tensor]:
    """The state of every process's generators, of several processes that of the CPU and of each one's own GPU."""
    if world.size == 1:
        return rng_tensors()
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[_GPU] = torch.cuda.get_rng_state()
    gathered = {}
    for kind, state in states.items():
        for rank, other in enumerate(world.gather(state)):
            own = {_CPU: _CPU, _GPU: _FIRST_GPU}[kind]
            gathered[own if rank == 0 else _name(rank, kind)] = other
    return gathered


def restore_random_state(world: World, tensors: Mapping[str, Tensor]) -> None:
    """Put the generators of this process back.

    A process of a number that the run did not have when it was saved starts from a seed that is drawn from the main
    one's state and its number: the same whenever that checkpoint is continued.

    Raises:
        CheckpointError: a state is missing or does not fit.
    """
    if world.size == 1:
        restore_rng({name: tensors[name] for name in tensors if not name.startswith("rank-")})
        return
    here = f"cuda.{torch.cuda.current_device()}" if torch.cuda.is_initialized() else ""
    names = (
        {_CPU: _CPU, _GPU: _FIRST_GPU} if world.is_rank0 else {kind: _name(world.rank, kind) for kind in (_CPU, _GPU)}
    )
    if world.is_rank0 or names[_CPU] in tensors:
        own = {_CPU: names[_CPU], **({here: names[_GPU]} if here else {})}
        restore_rng({kind: tensors[name] for kind, name in own.items() if name in tensors})
        return
    seed = hashlib.sha256(tensors[_CPU].numpy().tobytes() + b"%d" % world.rank).digest()[:7]
    torch.manual_seed(int.from_bytes(seed))


def _name(rank: int, kind: str) -> str:
    return f"rank-{rank}.{kind}"
