"""The processes of a run: one, or several that a launcher such as torchrun has started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as distributed

from mohawkify.errors import UsageError


@dataclass(frozen=True)
class World(AbstractContextManager["World"]):
    """The processes that work on one run together; closing it leaves their group.

    Args:
        rank: this process, from 0; the main one writes files and speaks.
        size: how many there are.
        local_rank: this process among those of its machine, the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Add up figures over all processes, which give the same names in the same order."""
        return dict(zip(figures, self._reduce(list(figures.values()), distributed.ReduceOp.SUM), strict=True))

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        return self._reduce([number], distributed.ReduceOp.MAX)[0]

    def broadcast(self, text: str) -> str:
        """The main process's text."""
        if self.size == 1:
            return text
        # Bytes, not objects: those would travel as pickles.
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        distributed.broadcast(length, 0)
        if not self.is_main:
            content = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def barrier(self) -> None:
        """Wait until every process is here."""
        self._reduce([0.0], distributed.ReduceOp.SUM)

    def _reduce(self, numbers: list[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(tensor, operation)
        return [float(number) for number in tensor]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def require_group() -> None:
    """Found a group of this one process where no launcher started several: DeepSpeed and FSDP2 always need one."""
    # DeepSpeed and FSDP2 call collectives by names that torch 2.13 warns of, in every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def join_world() -> World:
    """Join the processes that a launcher has started; alone where none has.

    Raises:
        UsageError: the launcher's variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return World()
    if len(found) < len(names) or not all(value.isdigit() for value in found.values()):
        raise UsageError(
            f"found {found} in the environment, expected whole numbers for {', '.join(names)}",
            hint="start with --processes, torchrun, accelerate launch or deepspeed, which set all of them",
        )
    rank, size, local_rank = (int(found[name]) for name in names)
    if size == 1:
        return World()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(rank, size, local_rank)
