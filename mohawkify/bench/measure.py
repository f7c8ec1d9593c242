"""Time and memory, measured so that they can be compared: side by side, and in a process of their own."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mohawkify.distributed.device import wait_for
from mohawkify.errors import MohawkifyError

MAPPED_FROM_BYTES = 65536  # what is larger is mapped for itself by malloc, and given back at once


@dataclass(frozen=True)
class Timing:
    """The durations of one thing, measured in turn with others."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Longest less shortest over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def over(self, other: Timing) -> float:
        """Share of the other's time: the median of the rounds' ratios, since both share a round's noise."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def to_json(self) -> dict[str, float]:
        """Median and spread."""
        return {"seconds": self.median, "spread": self.spread}


def side_by_side(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time functions in turn, round after round, after one warm-up each.

    Args:
        device: synchronised around each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for each in range(-1, rounds):
        for name, function in functions.items():
            duration = seconds_of(function, device)
            if each >= 0:
                seconds[name].append(duration)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    wait_for(device)
    begin = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begin


def peak_over(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that is in use during a call over what was in use before it, in bytes.

    On CPUs the call has to be the largest thing this process ever did: the system remembers one peak per process, so
    `peak_in_child` runs it in a fresh one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident_bytes("VmRSS")
    function()
    return max(_resident_bytes("VmHWM") - before, 0)


def peak_in_child(task: dict[str, Any]) -> int:
    """`peak_over` of what `mohawkify.bench.child` makes of a task, in a fresh process on the CPU.

    Args:
        task: JSON; see `child.py`.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM_BYTES), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "mohawkify.bench.child", json.dumps({**task, "threads": torch.get_num_threads()})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise MohawkifyError(f"the memory of {task} could not be measured: {last}", hint="is there enough of it?")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def can_measure_memory() -> bool:
    """Whether this system reports the peak memory of a process."""
    return Path("/proc/self/status").is_file()


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None  # Linux has both
    return int(found[1]) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Free memory in bytes, or None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return int(found[1]) * 1024 if found else None


def machine(device: torch.device) -> dict[str, Any]:
    """The machine of the measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
