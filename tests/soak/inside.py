"""What goes wrong inside a child of the server; every function named as a `fault` is a context manager here."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mohawkify.cli.main import main
from mohawkify.train import loop, saving, trainer
from mohawkify.train.engines.engine import LocalEngine
from tests.files import faults

# Moments of a conversion by the function that begins them, as the caller finds it.
EVENTS = {
    "loading": ("mohawkify.train.preparation", "load_teacher"),
    "tokenising": ("mohawkify.data.tokenize_workers", "encode_documents"),
    "building": ("mohawkify.train.preparation", "build_student"),
    "measuring": ("mohawkify.train.measuring", "measure_fidelity"),
    "measuring a batch": ("mohawkify.evaluation.fidelity", "_add_batch"),
    "reading": ("mohawkify.data.loader", "packed_batch"),
    "micro-batch": ("mohawkify.train.loop", "Runner"),
    "update": ("mohawkify.train.engines.engine.LocalEngine", "step"),
    "logging": ("mohawkify.files.atomic", "append_line"),
    "saving": ("mohawkify.run.checkpoint", "save_checkpoint"),
    "tensors saved": ("mohawkify.run.checkpoint", "write_json"),
    "rotating": ("mohawkify.run.checkpoint", "rotate"),
    "final_teacher": ("mohawkify.train.trainer", "save_student"),
    "weights written": ("mohawkify.student.save", "save_tokenizer"),
}
# Functions during which operations on the disk are counted.
WINDOWS = {
    "save": ("mohawkify.train.saving.CheckpointWriter", "save"),
    "measure": ("mohawkify.train.trainer", "measure"),
    "final_phase": ("mohawkify.train.trainer", "write_student"),
    "export": ("mohawkify.exporters.export", "export_run"),
    "convert": ("mohawkify.train.trainer", "convert"),
}
CHANGING = tuple(name for name in faults.OPERATIONS if name not in ("open", "fchmod"))


def run(arguments: list[str], fault: str | None, options: dict[str, Any]) -> int:
    """Run a command line with a fault; returns its exit code."""
    with globals()[fault](**options) if fault else nullcontext():
        try:
            main(arguments)
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else 0
    return 0


@contextmanager
def at(events: list[tuple[str, int, str]]) -> Iterator[None]:
    """Act when events begin: (event, its how-manieth time, action)."""
    with ExitStack() as stack:
        for name in {event for event, _, _ in events}:
            wanted = {number: action for event, number, action in events if event == name}
            stack.enter_context(_counted(EVENTS[name], wanted))
        yield


@contextmanager
def disk(
    window: str, call: int, index: int, action: str, count_to: str | None = None, until: int = 1
) -> Iterator[None]:
    """Act at one operation on the disk, counted from 0, during one call of a window's function.

    Args:
        window: one of `WINDOWS`.
        call: which call of the function, from 1.
        index: of the operation; -1 for none.
        action: a signal, or an error of the system such as ENOSPC.
        count_to: a file that gets the number of operations of that call.
        until: in how many calls, from that one on, the operation fails.
    """
    calls = 0

    def window_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if not call <= calls < call + until:
                return function(*args, **kwargs)
            with faults.fault_at(index, _action(action), CHANGING) as begun:
                try:
                    return function(*args, **kwargs)
                finally:
                    if count_to is not None:
                        Path(count_to).write_text(json.dumps(begun))

        return called

    with _patched(WINDOWS[window], window_of):
        yield


@contextmanager
def full_disk(times: int) -> Iterator[None]:
    """The disk is full for the first so many tries to save, without long waits between."""
    left = times

    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def save(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                with faults.fault_at(0, faults.raise_error(errno.ENOSPC), ("write", "save_file")):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

        return save

    with (
        mock.patch.object(saving, "SECONDS_BETWEEN_TRIES", 0.05),
        _patched(("mohawkify.run.checkpoint", "save_checkpoint"), fails),
    ):
        yield


@contextmanager
def full_log(first: int, times: int) -> Iterator[None]:
    """The disk has no room for some lines of the log, from one try to write one on, without long waits between."""
    tries = 0

    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def append(*args: Any, **kwargs: Any) -> Any:
            nonlocal tries
            tries += 1
            if first <= tries < first + times:
                with faults.fault_at(0, faults.raise_error(errno.ENOSPC), ("write",)):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

        return append

    with mock.patch.object(saving, "SECONDS_BETWEEN_TRIES", 0.05), _patched(EVENTS["logging"], fails):
        yield


@contextmanager
def tmpfs(place: str, size: int, filled_at: int, freed: bool) -> Iterator[None]:
    """A small disk of its own on a folder, copied back at the end; before a certain save it is filled to the brim.

    Args:
        place: the folder where it is mounted.
        size: in bytes.
        filled_at: the number of the save.
        freed: whether the space comes back once the run says that it waits.
    """
    import shutil
    import subprocess

    copy = Path(f"{place}.copy")
    _enter_namespace()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    ballast = Path(place) / ".ballast"
    original = saving.CheckpointWriter.save
    saves = 0

    def save(self: Any, *args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == filled_at:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        original(self, *args)

    def wait(seconds: float) -> None:
        if freed:
            ballast.unlink(missing_ok=True)

    try:
        with mock.patch.object(saving.CheckpointWriter, "save", save), mock.patch.object(saving.time, "sleep", wait):
            yield
    finally:
        ballast.unlink(missing_ok=True)
        shutil.copytree(place, copy, dirs_exist_ok=True)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield


@contextmanager
def bounded(output: str, say_to: str) -> Iterator[None]:
    """Look at a run before every operation on the disk; write down the most checkpoints and bytes there ever were."""
    most = {"checkpoints": 0, "bytes": 0}
    checkpoints = os.path.join(output, "checkpoints")

    def looking(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
            most["checkpoints"] = max(most["checkpoints"], sum("step-" in name for name in names))
            most["bytes"] = max(most["bytes"], size_of(Path(output)))
            return original(*args, **kwargs)

        return operation

    try:
        with faults.replaced(looking, CHANGING):
            yield
    finally:
        Path(say_to).write_text(json.dumps(most))


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def poison(site: str, stage: str, step: int, micro_batch: int, value: float, say_to: str) -> Iterator[None]:
    """Put a number that is not finite where a run computes, and write down the weights' hash before and after.

    Args:
        site: teacher, student, gradient, optimizer or weight.
        stage: in which stage.
        step: in which of its steps, from 1; before that step's save for a weight.
        micro_batch: in which of its micro-batches, from 1.
        value: the number.
        say_to: gets the hashes of the student's weights before that step and when the run ends.
    """
    place = {"stage": "", "step": 0, "micro": 0}
    hashes: dict[str, str] = {}
    seen: dict[str, Any] = {}
    steps, read_batches = loop.steps, loop.read_batches

    def begin_stage(conversion: Any, begun: Any, engine: Any, micro: int, first_step: int, check: Any) -> Any:
        place["stage"], place["step"], which = begun.name, first_step, begun.objective
        seen["objective"], seen["engine"] = which, engine
        inner = which.run

        def run_micro(batch: Any, runner: Any) -> Any:
            place["micro"] += 1
            here = place["stage"] == stage and place["step"] == step and place["micro"] == micro_batch
            if not here:
                return inner(batch, runner)
            with _poisoned_module(which.models, site, value):
                metrics = inner(batch, runner)
            if site == "gradient":
                _spoil(next(iter(which.parameters().values())).grad, value)
            if site == "optimizer":
                _spoil(next(iter(engine.adamw.state.values()))["exp_avg"], value)
            return metrics

        which.run = run_micro
        return steps(conversion, begun, engine, micro, first_step, check)

    def begin_steps(*args: Any, **kwargs: Any) -> Any:
        for batch in read_batches(*args, **kwargs):
            place["step"] += 1
            place["micro"] = 0
            if place["stage"] == stage and place["step"] == step:
                hashes["before"] = _hash_of(seen["objective"].models.student)
            yield batch

    save = saving.CheckpointWriter.save

    def spoil_and_save(self: Any, engine: Any, state: Any, *more: Any) -> None:
        if site == "weight" and state.stage == stage and state.stage_step == step:
            _spoil(next(iter(self._conversion.models.student.parameters())), value)
        save(self, engine, state, *more)

    try:
        with (
            mock.patch.object(trainer, "steps", begin_stage),
            mock.patch.object(loop, "read_batches", begin_steps),
            mock.patch.object(saving.CheckpointWriter, "save", spoil_and_save),
        ):
            yield
    finally:
        if "objective" in seen:
            hashes["after"] = _hash_of(seen["objective"].models.student)
        Path(say_to).write_text(json.dumps(hashes))


@contextmanager
def idle(kind: str) -> Iterator[None]:
    """Training that looks alive and does not learn.

    Args:
        kind: `rate` for a learning rate of 0, `skipped` for an optimiser that skips every step, `forgotten` for a
            parameter it does not get, `frozen` for one that takes no gradient, `detached` for a layer cut out of the
            graph, `leaking` for a frozen one that moves.
    """
    steps, engine_init = trainer.steps, LocalEngine.__init__

    def begin_stage(conversion: Any, stage: Any, engine: Any, *more: Any) -> Any:
        trained, student = stage.objective.parameters(), conversion.models.student
        parameters = list(trained.values())
        if kind == "frozen":
            parameters[0].requires_grad_(False)
        if kind == "detached":
            module = next(m for m in student.modules() if isinstance(m, torch.nn.Linear))
            module.register_forward_hook(lambda module, inputs, output: output.detach())
        if kind == "leaking":
            step = engine.step
            frozen = next(name for name, _ in student.named_parameters() if name not in trained)

            def leak(rate: float) -> float:
                with torch.no_grad():
                    student.get_parameter(frozen).add_(1e-3)
                return step(rate)

            engine.step = leak
        return steps(conversion, stage, engine, *more)

    def forgetful(self: Any, *args: Any) -> None:
        engine_init(self, *args)
        if kind == "forgotten":
            self.adamw.param_groups[0]["params"].pop()
        if kind == "skipped":
            self.adamw.step = lambda: None

    with (
        mock.patch.object(trainer, "steps", begin_stage),
        mock.patch.object(LocalEngine, "__init__", forgetful),
        mock.patch.object(loop, "learning_rate", return_value=0.0) if kind == "rate" else nullcontext(),
    ):
        yield


@contextmanager
def spike(stage: str, step: int, factor: float, events: list[tuple[str, int, str]]) -> Iterator[None]:
    """The loss of one step is reported many times too high; further events as in `at`."""
    original = loop.StepReport

    def report(number: int, tokens: int, rate: float, norm: float, seconds: float, metrics: dict[str, float]) -> Any:
        if number == step and seen.get("stage") == stage:
            metrics = {**metrics, "loss": metrics["loss"] * factor}
        return original(number, tokens, rate, norm, seconds, metrics)

    seen: dict[str, str] = {}
    steps = trainer.steps

    def begin_stage(conversion: Any, begun: Any, *more: Any) -> Any:
        seen["stage"] = begun.name
        return steps(conversion, begun, *more)

    with (
        mock.patch.object(trainer, "steps", begin_stage),
        mock.patch.object(loop, "StepReport", report),
        at(events),
    ):
        yield


def _enter_namespace() -> None:
    """Give this process mounts of its own, as `unshare -rm` does, and the right to make some."""
    import ctypes

    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)


def _action(name: str) -> Callable[[], None]:
    """A signal to this process, a hang, no memory, a stop until the test says go, or an error of the system."""
    if name.startswith("SIG"):
        return lambda: os.kill(os.getpid(), getattr(signal, name))
    if name.startswith("touch "):
        return Path(name.removeprefix("touch ")).touch
    if name == "block":
        return lambda: threading.Event().wait() and None
    if name == "memory":
        return _fill_memory
    if name.startswith("memory limit "):
        return lambda: _limit_memory(int(name.removeprefix("memory limit ")))
    if name.startswith("hold "):
        return lambda: _hold(Path(name.removeprefix("hold ")))
    return faults.raise_error(getattr(errno, name))


def _fill_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _limit_memory(more: int) -> None:
    """Let this process take only so many bytes of address space more than it has."""
    import psutil

    limit = psutil.Process().memory_info().vms + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _hold(fifo: Path) -> None:
    """Say that we are here and wait for a byte from the test."""
    fifo.with_suffix(".here").touch()
    with fifo.open("rb", buffering=0) as file:
        file.read(1)


@contextmanager
def _counted(place: tuple[str, str], wanted: dict[int, str]) -> Iterator[None]:
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count in wanted:
                _action(wanted[count])()
            return function(*args, **kwargs)

        return called

    with _patched(place, counting):
        yield


@contextmanager
def _patched(place: tuple[str, str], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a function of a module, or a method of a class, by a wrapped one."""
    holder, name = place
    try:
        owner = importlib.import_module(holder)
    except ModuleNotFoundError:
        module, _, class_name = holder.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    with mock.patch.object(owner, name, wrap(getattr(owner, name))):
        yield


@contextmanager
def _poisoned_module(pair: Any, site: str, value: float) -> Iterator[None]:
    """Spoil one number that a module of teacher or student puts out."""
    if site not in ("teacher", "student"):
        yield
        return
    model = pair.teacher if site == "teacher" else pair.student
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(-1)[0] = value
        return output

    # Of the teacher what every stage computes; of the student all, since each stage runs its own modules.
    chosen = layers[:1] if site == "teacher" else layers
    handles = [module.register_forward_hook(hook) for module in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spoil(tensor: Any, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] = value


def _hash_of(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
