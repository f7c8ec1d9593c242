"""The command line in several processes: start them, join them, and end all of them with one line and one exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mohawkify.cli.error_lines import DEBUG_FLAG, LAUNCHED, describe, print_error
from mohawkify.distributed.launch import launch, rank_from_environment
from mohawkify.errors import UsageError

if TYPE_CHECKING:
    from mohawkify.distributed.process_group import World


def start_processes(num_processes: int | None) -> None:
    """Start the processes of a command with several, unless a launcher has started them; does not return then.

    Raises:
        UsageError: a launcher has started another number of processes than --processes.
    """
    own = rank_from_environment()
    if own is not None:
        if num_processes is not None and num_processes != own.size:
            raise UsageError(
                f"found --processes {num_processes} in one of {own.size} processes that a launcher has started",
                hint="leave --processes out under torchrun, accelerate launch, deepspeed or srun",
            )
        return
    if num_processes is not None and num_processes > 1:
        arguments = click.get_current_context().find_root().obj
        os.environ[LAUNCHED] = "1"
        raise SystemExit(launch(num_processes, arguments, print_error))


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes of the run; an error in any of them is printed once and ends all with its exit code.

    Args:
        device: the recipe's ``compute.device``.
    """
    from mohawkify.distributed.process_group import join_world

    world = join_world(device)
    if world.failures is None:
        yield world
        return
    try:
        with world:
            yield world
    except (Exception, KeyboardInterrupt) as error:
        _leave(world, error)


def _leave(world: World, error: BaseException) -> None:
    """End this process: nothing it waits for would come any more, so nothing is waited for."""
    from mohawkify.distributed.failures import is_lost, lost

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # launchers send it to the rest when one process has ended
    if is_lost(error):
        error = lost(error)
    message, hint, code = describe(error)

    def say() -> None:
        if DEBUG_FLAG in sys.argv:
            traceback.print_exception(error, file=sys.stderr)
        print_error(message, hint)

    assert world.failures is not None
    code = world.failures.report(code, say)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
