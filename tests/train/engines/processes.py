"""Runs a function in several real processes with a gloo group between them, and takes their answers."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as distributed

from mohawkify.distributed.process_group import World, join_world
from mohawkify.errors import MohawkifyError

SECONDS = 240  # for one group of processes; alone on a machine the longest takes about 10


def run_processes(function: Callable[..., Any], num_processes: int, *args: Any) -> list[Any]:
    """What ``function(world, *args)`` returns in each of several processes, by rank.

    Raises:
        AssertionError: a process failed, died or took too long; none is left running.
        MohawkifyError: every process raised one of the same class with the same message.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.engines.preload"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, pipes = [], []
    for rank in range(num_processes):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_run, args=(environment, sender, function, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        answers = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
    errors = [answer for kind, answer in answers if kind == "refused"]
    if errors and len(errors) == num_processes and len({str(error) for error in errors}) == 1:
        raise errors[0]
    failed = [f"rank {rank}: {answer}" for rank, (kind, answer) in enumerate(answers) if kind != "done"]
    assert not failed, "\n".join(failed)
    return [answer for _, answer in answers]


def _receive(pipe: Connection, rank: int) -> tuple[str, Any]:
    if not pipe.poll(SECONDS):
        return "failed", f"no answer within {SECONDS} s"
    try:
        return pipe.recv()
    except EOFError:
        return "failed", f"process {rank} died"


def _run(environment: dict[str, Any], sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        world = join_world()
        try:
            sender.send(("done", function(world, *args)))
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
    except MohawkifyError as error:
        sender.send(("refused", error))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    sender.close()


__all__ = ["World", "run_processes"]
