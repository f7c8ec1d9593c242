"""The processes of a run: one, or several that a launcher such as torchrun has started."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from mohawkify.distributed.failures import FailureReporter, is_lost, lost
from mohawkify.distributed.launch import find_place
from mohawkify.errors import UsageError

Result = TypeVar("Result")
# A dead process closes its connections, and what hangs is what `train/watchdog.py` is for: waiting itself is no error.
_TIMEOUT = timedelta(days=7)
_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.2  # seconds between two looks whether the main process is done
_LIFE = "life of the main process"


class World(AbstractContextManager["World"]):
    """The processes that work on one run together; closing it leaves their group.

    Args:
        rank: this process, from 0; the main one writes files and speaks.
        size: how many there are.
        local_rank: this process among those of its machine, the number of its GPU.
        store: text that they share; None for one process.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, store: distributed.TCPStore | None = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._num_calls = 0
        self._store: distributed.Store | None = None
        self.alarm: FailureReporter | None = None
        if store is not None:
            prefix = f"mohawkify/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            self._store = distributed.PrefixStore(prefix, store)
            self.alarm = FailureReporter(distributed.PrefixStore(prefix, store.clone()), rank, size)  # type: ignore[attr-defined]

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Add up metrics over all processes, which give the same names in the same order."""
        return dict(zip(metrics, self._reduce(list(metrics.values()), distributed.ReduceOp.SUM), strict=True))

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        return self._reduce([number], distributed.ReduceOp.MAX)[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All processes' tensors on the CPU, which have one shape and dtype, in the order of their ranks."""
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        self._collect(lambda: distributed.all_gather(tensors, tensor))
        return tensors

    def barrier(self) -> None:
        """Wait until every process is here."""
        self._reduce([0.0], distributed.ReduceOp.SUM)

    def on_rank0(self, function: Callable[[], Result], beat: Callable[[], None] = lambda: None) -> Result:
        """Call a function in the main process alone.

        Args:
            function: returns what JSON can hold.
            beat: called by those that wait whenever the main process has shown that it gets on.

        Returns:
            What it returned, in every process.
        """
        if self.size == 1:
            return function()
        assert self._store is not None
        self._num_calls += 1
        key = f"by main/{self._num_calls}"
        if self.is_rank0:
            text = json.dumps(function())
            self._store.set(key, text)
        else:
            text = self._await_text(key, beat)
        result: Result = json.loads(text)
        return result

    def heartbeat(self) -> None:
        """Show those that wait in `on_rank0` that the main process gets on; its watch calls it."""
        if self._store is not None:
            with suppress(RuntimeError):  # the main thread will learn it too
                self._store.add(_LIFE, 1)

    def rank0_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the main process, and then in the others: they find on the disk what it made."""
        if self.is_rank0:
            result = function()
        self.on_rank0(lambda: None)
        return result if self.is_rank0 else function()

    def _await_text(self, key: str, beat: Callable[[], None]) -> str:
        assert self._store is not None
        assert self.alarm is not None
        wait = _SHORTEST_WAIT
        try:
            seen = self._store.add(_LIFE, 0)
            while not self._store.check([key]):
                self.alarm.raise_if_peer_failed()
                before, seen = seen, self._store.add(_LIFE, 0)
                if seen != before:
                    beat()
                time.sleep(wait)
                wait = min(1.5 * wait, _LONGEST_WAIT)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise lost(error) from error

    def _reduce(self, numbers: list[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._collect(lambda: distributed.all_reduce(tensor, operation))
        return tensor.tolist()

    @staticmethod
    def _collect(collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise (lost(error) if is_lost(error) else error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.size > 1:
            self.barrier()  # some launchers kill the rest when one has ended
        if self.alarm is not None and kind is None:
            self.alarm.close()
        if distributed.is_initialized() and kind is None:
            distributed.destroy_process_group()


def require_group() -> None:
    """Found a group of this one process where no launcher started several: DeepSpeed and FSDP2 always need one."""
    # DeepSpeed and FSDP2 call collectives by names that torch 2.13 warns of, in every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def join_world(device: str = "auto") -> World:
    """Join the processes that a launcher has started; alone where none has.

    Args:
        device: a recipe's ``compute.device``; each process takes the GPU of its number.

    Raises:
        UsageError: the launcher's variables contradict each other, or there are more processes than GPUs.
        ProcessLostError: the others cannot be reached.
    """
    place = find_place()
    if place is None or place.size == 1:
        return World()
    if place.address is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address, str(place.port)
    has_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if has_gpus:
        num_gpus = torch.cuda.device_count()
        if place.local_rank >= num_gpus:
            raise UsageError(
                f"found more processes on this machine than its {num_gpus} GPUs, expected one for each",
                hint="start fewer processes, or use --set compute.device=cpu",
            )
        torch.cuda.set_device(place.local_rank)
    try:
        store, _, _ = next(
            distributed.rendezvous("env://", rank=place.rank, world_size=place.size, timeout=timedelta(minutes=15))
        )
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise lost(error) from error
    return World(place.rank, place.size, place.local_rank, store)
