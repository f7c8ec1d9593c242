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
from mohawkify.distributed.launch import rank_from_environment
from mohawkify.errors import UsageError

Result = TypeVar("Result")
# A dead process closes its connections, and `train/watchdog.py` ends hangs: a long wait alone is no error.
_TIMEOUT = timedelta(days=7)
_SHORTEST_POLL, _LONGEST_POLL = 0.01, 0.2  # seconds between two polls of the result of rank 0
_HEARTBEATS = "heartbeats of rank 0"


class World(AbstractContextManager["World"]):
    """The processes that work on one run together; closing it leaves their group.

    Args:
        rank: this process, from 0; rank 0 writes files and prints.
        local_rank: this process among those of its machine, the number of its GPU.
        store: the rendezvous store; None for one process.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, store: distributed.TCPStore | None = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._num_calls = 0
        self._store: distributed.Store | None = None
        self.failures: FailureReporter | None = None
        if store is not None:
            prefix = f"mohawkify/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            self._store = distributed.PrefixStore(prefix, store)
            self.failures = FailureReporter(distributed.PrefixStore(prefix, store.clone()), rank, size)  # type: ignore[attr-defined]

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sum metrics over all processes, which pass the same names in the same order."""
        return dict(zip(metrics, self._reduce(list(metrics.values()), distributed.ReduceOp.SUM), strict=True))

    def max(self, value: float) -> float:
        """The largest of all processes' values."""
        return self._reduce([value], distributed.ReduceOp.MAX)[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensors of all processes, of one shape and dtype, in the order of ranks."""
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        self._run(lambda: distributed.all_gather(tensors, tensor))
        return tensors

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, of one shape and dtype, on the first one's device; it may be in place."""
        if self.size > 1:
            whole = tensor.cpu()
            self._run(lambda: distributed.all_reduce(whole))
            tensor.copy_(whole)
        return tensor

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self._reduce([0.0], distributed.ReduceOp.SUM)

    def on_rank0(self, function: Callable[[], Result], heartbeat: Callable[[], None] = lambda: None) -> Result:
        """Call a function on rank 0 alone.

        Args:
            function: its result must be JSON.
            heartbeat: called in the waiting processes for every heartbeat of rank 0.

        Returns:
            The result, in every process.
        """
        if self.size == 1:
            return function()
        assert self._store is not None
        self._num_calls += 1
        key = f"on rank 0/{self._num_calls}"
        if self.is_rank0:
            text = json.dumps(function())
            self._store.set(key, text)
        else:
            text = self._wait_for(key, heartbeat)
        result: Result = json.loads(text)
        return result

    def heartbeat(self) -> None:
        """Report progress of rank 0 to the processes that wait in `on_rank0`; the watchdog of rank 0 calls it."""
        if self._store is not None:
            with suppress(RuntimeError):  # the main thread gets the same error
                self._store.add(_HEARTBEATS, 1)

    def rank0_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on rank 0, and then in the others: they find the files that it wrote."""
        if self.is_rank0:
            result = function()
        self.on_rank0(lambda: None)
        return result if self.is_rank0 else function()

    def _wait_for(self, key: str, heartbeat: Callable[[], None]) -> str:
        assert self._store is not None
        assert self.failures is not None
        seconds = _SHORTEST_POLL
        try:
            seen = self._store.add(_HEARTBEATS, 0)
            while not self._store.check([key]):
                self.failures.raise_if_peer_failed()
                before, seen = seen, self._store.add(_HEARTBEATS, 0)
                if seen != before:
                    heartbeat()
                time.sleep(seconds)
                seconds = min(1.5 * seconds, _LONGEST_POLL)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise lost(error) from error

    def _reduce(self, values: list[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        self._run(lambda: distributed.all_reduce(tensor, operation))
        return tensor.tolist()

    @staticmethod
    def _run(collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise (lost(error) if is_lost(error) else error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.size > 1:
            self.barrier()  # some launchers kill the rest when one has ended
        if self.failures is not None and kind is None:
            self.failures.close()
        if distributed.is_initialized() and kind is None:
            distributed.destroy_process_group()


def require_group() -> None:
    """Make a group of this process alone if there is none: DeepSpeed and FSDP2 always need one."""
    # DeepSpeed and FSDP2 call collectives by names that torch 2.13 has deprecated, and every call warns.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def join_world(device: str = "auto") -> World:
    """Join the processes that a launcher has started; a world of one without a launcher.

    Args:
        device: a recipe's ``compute.device``; each process takes the GPU of its number.

    Raises:
        UsageError: the launcher's variables contradict each other, or there are more processes than GPUs.
        ProcessLostError: the others cannot be reached.
    """
    own = rank_from_environment()
    if own is None or own.size == 1:
        return World()
    if own.address is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = own.address, str(own.port)
    has_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if has_gpus:
        num_gpus = torch.cuda.device_count()
        if own.local_rank >= num_gpus:
            raise UsageError(
                f"found more processes on this machine than its {num_gpus} GPUs, expected one for each",
                hint="start fewer processes, or use --set compute.device=cpu",
            )
        torch.cuda.set_device(own.local_rank)
    try:
        store, _, _ = next(
            distributed.rendezvous("env://", rank=own.rank, world_size=own.size, timeout=timedelta(minutes=15))
        )
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=store,
            rank=own.rank,
            world_size=own.size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise lost(error) from error
    return World(own.rank, own.size, own.local_rank, store)
