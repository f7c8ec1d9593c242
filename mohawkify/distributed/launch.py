"""Starts the processes of a run on this machine through torchrun, and reads the variables of other launchers.

Importing this module loads no torch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mohawkify.errors import HANG, UsageError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_SLURM_PORTS = 15_000, 20_000  # the first, and how many: apart from those that systems hand out
_RUN_NAME = "mohawkify"


@dataclass(frozen=True)
class Rank:
    """The number of this process among those of the run.

    Args:
        rank: its number, from 0.
        local_rank: its number among those of its machine.
        address: the machine of process 0; None if the launcher's variables name it.
    """

    rank: int
    size: int
    local_rank: int
    address: str | None = None
    port: int | None = None


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Read the variables of a launcher: torchrun, accelerate launch, deepspeed or srun; None without one.

    Raises:
        UsageError: the variables are incomplete or contradict each other.
    """
    if any(name in environment for name in VARIABLES):
        rank, size, local_rank = _read_counts(environment, VARIABLES)
        found = Rank(rank, size, local_rank)
    elif "SLURM_STEP_NUM_TASKS" in environment:  # set by srun alone; a plain batch script is one process
        rank, size, local_rank = _read_counts(environment, _SLURM[:3])
        first, count = _SLURM_PORTS
        port = environment.get("MASTER_PORT") or str(first + int(environment.get("SLURM_JOB_ID", "0")) % count)
        address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
        found = Rank(rank, size, local_rank, address, int(port))
    else:
        return None
    if not (found.rank < found.size and found.local_rank < found.size):
        raise UsageError(f"found process {found.rank} of {found.size} in the environment, expected one below its size")
    return found


def first_host(hosts: str) -> str:
    """The first name of a list as SLURM writes it: ``node[03-05,9],other`` is ``node03``."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", hosts)
    if match is None:
        raise UsageError(f"found {hosts!r} as SLURM_STEP_NODELIST, expected names of machines")
    return match[1] + (match[2] or "") + (match[3] or "")


def launch(num_processes: int, arguments: Sequence[str], print_error: Callable[[str, str], None]) -> int:
    """Run this command line in several processes on this machine, started by torchrun's own library.

    Ctrl-C and SIGTERM are forwarded to all of them, once each: they agree on a step to stop at and save a checkpoint.
    torchrun alone would kill them after thirty seconds, also during a save.

    Args:
        arguments: those after ``mohawkify``.
        print_error: prints an error and a hint where all processes were killed before they could.

    Returns:
        The exit code: that of the first process to end with another one than 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes print their errors themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sent: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _forward(number, sent))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=_RUN_NAME,
        rdzv_backend="static",  # c10d unpickles what lies in a store that the whole network can reach
        rdzv_endpoint=f"127.0.0.1:{_free_port()}",
        rdzv_configs={"rank": 0},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=_no_logs(),
        signals_to_handle="SIGQUIT",  # the others are handled here
    )
    try:
        # -P: no file of the working directory is imported.
        elastic_launch(config, sys.executable)("-P", "-m", _RUN_NAME, *arguments)
    except ChildFailedError as error:
        return _exit_code(list(error.failures.values()), num_processes, sent, print_error)
    return 0


def _free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exit_code(
    failures: Sequence[ProcessFailure], num_processes: int, sent: Sequence[int], print_error: Callable[[str, str], None]
) -> int:
    """The exit code of a run whose processes failed in this order; killed ones have printed no error."""
    first = failures[0]
    if first.exitcode > 0:
        return first.exitcode
    if all(failure.exitcode < 0 for failure in failures):
        name = signal.Signals(-first.exitcode).name
        print_error(
            f"stopped by {name}" if sent else f"process {first.local_rank + 1} of {num_processes} was killed by {name}",
            "the newest checkpoint is intact and the same command continues",
        )
    return 128 + sent[-1] if sent else HANG


def _forward(number: int, sent: list[int]) -> None:
    import psutil

    sent.append(number)
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _no_logs() -> Any:
    """Settings under which torchrun does not redirect output; its default leaves folders of logs behind."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class NoLogs(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            none = dict.fromkeys(envs, "")
            return LogsDest(dict(none), dict(none), dict(none), dict(none), dict(none))

        @property
        def root_log_dir(self) -> str:
            return ""

    return NoLogs()


def _read_counts(environment: Mapping[str, str], names: Sequence[str]) -> list[int]:
    found = {name: environment[name] for name in names if name in environment}
    if len(found) < len(names) or not all(re.fullmatch("[0-9]{1,9}", value) for value in found.values()):
        raise UsageError(
            f"found {found} in the environment, expected whole numbers for {', '.join(names)}",
            hint="start with --processes, torchrun, accelerate launch, deepspeed or srun, which set all of them",
        )
    return [int(found[name]) for name in names]
