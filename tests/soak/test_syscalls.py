"""Killed at every system call of a save, a rotation and a resume's sweep: strace does the killing, from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mohawkify.files.atomic import sweep_temporaries
from mohawkify.run.checkpoint import list_checkpoints, load_tensors, newest_valid, rotate, save_checkpoint
from tests.soak.runs import Tally

# What changes a disk; each is counted by itself.
SYSCALLS = (
    "openat",
    "write",
    "pwrite64",
    "ftruncate",
    "fsync",
    "fchmod",
    "rename",
    "mkdir",
    "unlink",
    "unlinkat",
    "rmdir",
)
KEEP = 2


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((300,), float(step)), "bias": torch.arange(7) + float(step)}


def save(folder: Path, step: int) -> None:
    """One save and the rotation after it, as training does them."""
    save_checkpoint(
        folder, global_step=step, model_tensors=tensors(step), optimizer_tensors=tensors(-step), state={"step": step}
    )
    rotate(folder, KEEP)


def killed_by_strace(syscall: str, number: int, work: Callable[[], None]) -> bool:
    """Fork, let strace kill the child at the given call of its kind; False if the work ended before."""
    wait_here, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.read(wait_here, 1)
            work()
            code = 0
        finally:
            os._exit(code)
    command = ["strace", "-p", str(pid), "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=KILL:when={number}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        if "attached" not in attached:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.skip(f"strace may not trace here: {attached.strip()}")
        os.write(go, b"x")
        tracer.stderr.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(wait_here)
    os.close(go)
    assert code in (0, -signal.SIGKILL), f"the work failed with exit code {code}"
    return code != 0


@pytest.mark.full
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_p2_a_kill_at_every_system_call(tmp_path):
    whole = tmp_path / "whole"
    for step in (1, 2):
        save(whole, step)
    with Tally("P2", "SIGKILL by strace at every system call of a save with rotation") as tally:
        for syscall in SYSCALLS:
            number, was_killed = 0, True
            while was_killed:
                number += 1
                folder = tmp_path / f"{syscall}-{number}"
                shutil.copytree(whole, folder)
                with tally.trial(f"{syscall} {number}", folder):
                    was_killed = killed_by_strace(syscall, number, lambda folder=folder: save(folder, 3))  # type: ignore[misc]
                    found = newest_valid(folder, lambda line: None)
                    assert found is not None
                    assert found.global_step in ((2, 3) if was_killed else (3,))
                    for group, sign in (("model", 1), ("optimizer", -1)):
                        loaded = load_tensors(found, group)  # type: ignore[arg-type]
                        for name, tensor in tensors(sign * found.global_step).items():
                            assert torch.equal(loaded[name], tensor)
                    sweep_temporaries(folder)
                    save(folder, 3)
                    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
                    assert not list(folder.glob(".tmp-*"))
            tally.note(syscall, number - 1)
        assert tally.tried > 40
