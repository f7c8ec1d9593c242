"""Checkpoints: their content, the one that a run continues from, and the removal of old ones.

A checkpoint is the folder `step-<global step>` with the student's parameters, the optimiser's moments and the state of
the random generators as safetensors, the loop's own facts as strict JSON, and a manifest with the hash of every file:
safetensors alone loads changed values without complaint. Nothing in it is ever executed, so no pickle.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mohawkify.errors import CheckpointError, NumericsError, UsageError
from mohawkify.files.atomic import (
    atomic_directory,
    read_json,
    remove_directory,
    verify_directory,
    write_json,
)
from mohawkify.files.manifest import Heartbeat, no_heartbeat

if TYPE_CHECKING:
    from torch import Tensor

TensorGroup = Literal["model", "optimizer", "rng"]

_FORMAT = 1
_STATE_NAME = "state.json"
_FOLDER_NAME = re.compile(r"step-[0-9]{8,}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found as they were written.

    Args:
        global_step: optimiser steps done, counted over all stages.
        state: what the loop gave to `save_checkpoint`.
    """

    path: Path
    global_step: int
    state: dict[str, Any]


def save_checkpoint(
    directory: Path,
    *,
    global_step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    random_tensors: Mapping[str, Tensor] | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Path:
    """Write a checkpoint, complete or not at all.

    A valid checkpoint of the same step is kept as it is: the step was done again after a resume, and the folder belongs
    to one run. A damaged one is replaced.

    Args:
        global_step: optimiser steps done, counted over all stages.
        model_tensors: the student's parameters by name, on any device; the dtypes are kept.
        optimizer_tensors: the optimiser's tensors by name.
        state: a JSON object: where the run stands, and the hashes of what it started from.
        random_tensors: the state of the random generators of all processes; None for that of this one.
        heartbeat: called after every file that is written or flushed, and every part of one that is hashed.

    Returns:
        The checkpoint's folder.

    Raises:
        NumericsError: a tensor or a number of the state is not finite; nothing is written.
        DiskFullError: the disk has no room for it.
        StorageError: the disk refuses the files.
    """
    for kind, tensors in (("model", model_tensors), ("optimizer", optimizer_tensors)):
        _require_finite(kind, tensors)
    target = checkpoint_path(directory, global_step)
    if target.is_dir():
        if _is_valid(target, heartbeat):
            return target
        remove_directory(target)
    random_tensors = rng_tensors() if random_tensors is None else random_tensors
    groups = {"model": model_tensors, "optimizer": optimizer_tensors, "rng": random_tensors}
    needed = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
    facts = {"checkpoint_format": _FORMAT, "global_step": global_step}
    with atomic_directory(target, facts=facts, needed=needed, heartbeat=heartbeat) as folder:
        for name, tensors in groups.items():
            save_tensors(folder / f"{name}.safetensors", tensors)
            heartbeat()
        write_json(folder / _STATE_NAME, dict(state))
    return target


def checkpoint_path(directory: Path, global_step: int) -> Path:
    """The folder of the checkpoint after so many optimizer steps."""
    return directory / f"step-{global_step:08d}"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, inside a folder that `atomic_directory` handed out.

    Any layout is accepted; tensors that share memory are each written in full.
    """
    from safetensors.torch import save_file

    save_file(_separate(tensors), path)


def list_checkpoints(directory: Path) -> list[Path]:
    """List the folders that carry the name of a checkpoint, valid or not, by their step and never by the clock."""
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if _FOLDER_NAME.fullmatch(path.name))
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=_step_of)


def newest_valid(directory: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Find the checkpoint to continue from: the newest whose every byte is as it was written.

    Args:
        report: takes one line for each damaged checkpoint that is passed over; it stays where it is.

    Returns:
        The checkpoint, or None if there is no valid one.

    Raises:
        UsageError: another version of mohawkify wrote a checkpoint; it is not damaged and must not be passed over.
    """
    for path in reversed(list_checkpoints(directory)):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            report(f"skipping the damaged checkpoint {path.name}: {error.message}")
    return None


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a file, each read from the disk when it is accessed, to the CPU and into memory of its own."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        with _readable(path):
            self._file = safe_open(str(path), framework="pt")
            self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with _readable(self._path):
            # Without the copy a deleted checkpoint would still fill the disk: the file is mapped into memory.
            return self._file.get_tensor(name).clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._file.get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The type of a tensor's numbers, in safetensors' words: ``F32``."""
        return str(self._file.get_slice(name).get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(checkpoint: Checkpoint, group: TensorGroup) -> StoredTensors:
    """One of a checkpoint's groups of tensors; not one of them is read yet.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return StoredTensors(checkpoint.path / f"{group}.safetensors")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def rotate(directory: Path, keep: int, heartbeat: Heartbeat = no_heartbeat, kept_step: int | None = None) -> None:
    """Delete the checkpoints older than the newest `keep` valid ones, which are verified first.

    Args:
        kept_step: the optimizer steps of one that stays, however old it is.
        heartbeat: called after every part of a file that is hashed, and every folder that is removed.

    Raises:
        ValueError: `keep` is less than one.
        StorageError: an old checkpoint could not be deleted.
    """
    if keep < 1:
        raise ValueError(f"a run keeps at least one checkpoint, not {keep}")
    paths = list_checkpoints(directory)
    if len(paths) <= keep:
        return
    num_valid = 0
    for path in reversed(paths):
        if num_valid == keep:
            if _step_of(path) != kept_step:
                remove_directory(path)
                heartbeat()
        elif _is_valid(path, heartbeat):
            num_valid += 1


def rng_tensors() -> dict[str, Tensor]:
    """Read the state of torch's random generators.

    Returns:
        Bytes (uint8) under "cpu", and under "cuda.<index>" for each GPU if this process uses CUDA.
    """
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put torch's random generators back into a saved state.

    A run that moves to other hardware keeps the states that fit, and the log names the others.

    Raises:
        CheckpointError: the state of the CPU's generator is missing, or a state does not fit its generator.
    """
    import torch

    if "cpu" not in tensors:
        raise CheckpointError("the checkpoint holds no state of the CPU's random generator")
    saved = set(tensors) - {"cpu"}
    present = {f"cuda.{index}" for index in range(torch.cuda.device_count())}
    used = present if torch.cuda.is_initialized() else set()
    try:
        torch.set_rng_state(tensors["cpu"])
        for name in saved & present:
            torch.cuda.set_rng_state(tensors[name], int(name.removeprefix("cuda.")))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's random state does not fit this torch: {error}") from error
    for name in sorted(saved - present):
        _logger.warning("the random state of %s is not restored: this machine has no such device", name)
    for name in sorted(used - saved):
        _logger.warning("the random state of %s starts anew: the checkpoint was written without it", name)


def open_checkpoint(path: Path, heartbeat: Heartbeat = no_heartbeat) -> Checkpoint:
    """Verify a checkpoint and read its state.

    Args:
        heartbeat: called whenever a part of a file has been hashed.

    Raises:
        CheckpointError: a file is missing, extra or changed, or it is the checkpoint of another step.
        UsageError: another version of mohawkify wrote it.
    """
    manifest = verify_directory(path, heartbeat)
    facts = manifest["facts"]
    if facts.get("checkpoint_format") != _FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {facts.get('checkpoint_format')}, this mohawkify reads format {_FORMAT}",
            hint="continue with the version of mohawkify that wrote it, or choose another output folder",
        )
    if facts.get("global_step") != _step_of(path):
        raise CheckpointError(f"{path} was written as the checkpoint of step {facts.get('global_step')}")
    state = read_json(path / _STATE_NAME)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / _STATE_NAME} is not a JSON object")
    return Checkpoint(path=path, global_step=_step_of(path), state=state)


def _is_valid(path: Path, heartbeat: Heartbeat) -> bool:
    try:
        open_checkpoint(path, heartbeat)
    except CheckpointError:
        return False
    return True


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _require_finite(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities: a checkpoint with one would end every run that continues from it."""
    import torch

    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        # Both extremes are NaN where any element is. Measured over 50 times faster than isfinite on a CPU, and no copy.
        extremes = torch.stack(torch.aminmax(tensor.detach()))
        if not torch.isfinite(extremes).all():
            raise NumericsError(
                f"the {kind} tensor {name} holds a value that is not finite",
                hint="no checkpoint was written; the last one is still good",
            )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, each contiguous and in storage that no other one of them uses."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate
