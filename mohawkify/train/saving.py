"""Checkpoints of a run: written, also where the disk is full for a while; found, validated and continued from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import CheckpointError, DiskFullError
from mohawkify.recipe.schema import Recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RunFolder
from mohawkify.train.conversion import Conversion
from mohawkify.train.engines.engine import Engine
from mohawkify.train.rng_state import gather_random_state, restore_random_state
from mohawkify.train.step_log import StepLog
from mohawkify.train.training_state import TrainingState, read_training_state
from mohawkify.train.watchdog import Watchdog

SECONDS_BETWEEN_TRIES = 5.0  # of saving on a full disk
_COUNTER, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")  # AdamW's, of every parameter that has learned


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        conversion: the run.
        log: its lines are on the disk before a checkpoint is.
        stop: a request to stop ends a wait for space.
        saved_step: optimizer steps at the newest checkpoint.
    """

    def __init__(self, conversion: Conversion, log: StepLog, stop: Shutdown, saved_step: int) -> None:
        self._conversion, self._log, self._stop = conversion, log, stop
        self._saved_step = saved_step

    def has_saved(self, state: TrainingState) -> bool:
        """Whether the newest checkpoint is of this step."""
        return state.global_step == self._saved_step

    def save(self, engine: Engine, state: TrainingState, hang: Watchdog) -> None:
        """Write a checkpoint, and remove the oldest; all processes call it."""
        self._save({"model": engine.parameters(), "optimizer": engine.state()}, state, hang)

    def save_student(self, state: TrainingState, hang: Watchdog) -> None:
        """Write a checkpoint of a student that is in no engine; all processes call it."""
        parameters = {
            name: parameter.detach().cpu() for name, parameter in self._conversion.models.student.named_parameters()
        }
        self._save({"model": parameters, "optimizer": {}}, state, hang)

    def _save(self, groups: dict[str, dict[str, Tensor]], state: TrainingState, hang: Watchdog) -> None:
        world = self._conversion.world
        tensors = {**groups, "rng": gather_random_state(world)}
        world.on_rank0(lambda: self._write(tensors, state, hang), hang.heartbeat)
        self._saved_step = state.global_step
        hang.heartbeat()

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]], state: TrainingState, hang: Watchdog) -> None:
        conversion = self._conversion
        deadline = time.monotonic() + conversion.options.disk_wait
        while True:
            try:
                self._log.flush()
                checkpoint.save_checkpoint(
                    conversion.run.checkpoints,
                    global_step=state.global_step,
                    model_tensors=tensors["model"],
                    optimizer_tensors=tensors["optimizer"],
                    random_tensors=tensors["rng"],
                    state={**_origin(conversion), "training_state": asdict(state)},
                    heartbeat=hang.heartbeat,
                )
                break
            except DiskFullError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                conversion.options.report(f"{error.message}; waiting {left:.0f} s more for space")
                next_try = time.monotonic() + min(SECONDS_BETWEEN_TRIES, left)
                while time.monotonic() < next_try:
                    self._stop.check(
                        f"at step {state.stage_step:,} of stage {state.stage}, which the disk has no room for"
                    )
                    hang.heartbeat()
                    time.sleep(0.1)
        rotate_checkpoints(conversion.run, conversion.recipe, hang.heartbeat)


def rotate_checkpoints(run: RunFolder, recipe: Recipe, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Delete old checkpoints, but the one of the best student where that is to be the final one."""
    best = run.best_stage() if recipe.checkpoint.final == "best" else None
    checkpoint.rotate(run.checkpoints, recipe.checkpoint.keep, heartbeat, best and best[1])


def load_best_student(conversion: Conversion) -> str:
    """Give the student the weights that it had after its best stage, unless the last one is wanted.

    Returns:
        The name of the stage whose student this is.
    """
    run = conversion.run
    stages = run.results()["stages"]
    best, last = run.best_stage(), list(stages)[-1]
    if conversion.recipe.checkpoint.final == "last" or best is None or stages[best[0]]["kl"] == stages[last]["kl"]:
        return last
    name, steps = best
    try:
        saved = checkpoint.open_checkpoint(checkpoint.checkpoint_path(run.checkpoints, steps))
    except CheckpointError as error:
        conversion.options.report(
            f"the student after stage {name} was the best, but its checkpoint is lost ({error.message}): the final"
            f" student is the one after {last}"
        )
        return last
    _load_parameters(conversion, saved)
    conversion.options.report(
        f"the final student is the one after stage {name}, KL {stages[name]['kl']:.4f}; after {last} it was"
        f" {stages[last]['kl']:.4f} (checkpoint.final: last takes that one)"
    )
    return name


def newest_checkpoint(conversion: Conversion) -> checkpoint.Checkpoint | None:
    """The newest valid checkpoint; the main process hashes all its bytes to check that it is."""
    folder, report = conversion.run.checkpoints, conversion.options.report

    def newest() -> dict[str, Any] | None:
        saved = checkpoint.newest_valid(folder, report)
        if saved is None:
            number = len(checkpoint.list_checkpoints(folder))
            if number:
                report(f"none of {number} checkpoints is valid: beginning again")
            return None
        return {"path": str(saved.path), "global_step": saved.global_step, "state": saved.state}

    facts = conversion.world.on_rank0(newest)
    return checkpoint.Checkpoint(**{**facts, "path": Path(facts["path"])}) if facts else None


def resume_state(conversion: Conversion, saved: checkpoint.Checkpoint) -> TrainingState:
    """How far the run of a checkpoint was.

    Raises:
        CheckpointError: the checkpoint belongs to another recipe, teacher, text or student.
    """
    origin = _origin(conversion)
    if saved.state.get("identity") != origin["identity"]:
        raise CheckpointError(f"{saved.path} belongs to another recipe or teacher")
    if saved.state.get("text") != origin["text"]:
        raise CheckpointError(
            f"{saved.path} was trained on other text than is there now", hint="bring back the text, or start anew"
        )
    tensors, optimizer = (checkpoint.load_tensors(saved, group) for group in ("model", "optimizer"))
    require_fitting(saved.path, conversion.models.student, tensors, optimizer)
    state = read_training_state(saved, list(conversion.recipe.stages.blocks()))
    conversion.options.report(f"continuing after step {state.stage_step:,} of stage {state.stage}")
    return state


def require_fitting(
    path: Path, student: nn.Module, model: checkpoint.StoredTensors, optimizer: checkpoint.StoredTensors
) -> None:
    """Refuse tensors that the student or its optimiser could not take: a whole checkpoint can be another student's.

    None is read.

    Args:
        path: the checkpoint, for messages.
        student: whole, in no engine yet.
        model: its parameters.
        optimizer: what AdamW keeps of the trained ones, as ``kind/name``.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or type.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    if shapes.keys() != model.keys():
        raise CheckpointError(f"the tensors in {path} are not those of this student")
    learned = {key.partition("/")[2] for key in optimizer}
    wanted = {f"{kind}/{name}": shapes.get(name, ()) for name in learned for kind in _MOMENTS}
    wanted |= {f"{_COUNTER}/{name}": () for name in learned}
    if wanted.keys() != optimizer.keys():
        odd = min(wanted.keys() ^ optimizer.keys())
        raise CheckpointError(f"the optimiser state in {path} {'lacks' if odd in wanted else 'has an odd'} {odd}")
    for tensors, expected in ((model, shapes), (optimizer, wanted)):
        for name, shape in expected.items():
            found, kind = tensors.shape(name), tensors.kind(name)
            if found != shape or kind != "F32":
                raise CheckpointError(f"{name} in {path} has the shape {found} of {kind}, expected {shape} of F32")


def resume_engine(conversion: Conversion, saved: checkpoint.Checkpoint, engine: Engine) -> None:
    """Load weights, moments and random generators from a checkpoint."""
    engine.load_parameters(checkpoint.load_tensors(saved, "model"))
    engine.load_state(checkpoint.load_tensors(saved, "optimizer"))
    restore_random_state(conversion.world, checkpoint.load_tensors(saved, "rng"))


def resume_student(conversion: Conversion, saved: checkpoint.Checkpoint) -> None:
    """Load weights and random generators from a checkpoint of a student that was in no engine."""
    _load_parameters(conversion, saved)
    restore_random_state(conversion.world, checkpoint.load_tensors(saved, "rng"))


def _load_parameters(conversion: Conversion, saved: checkpoint.Checkpoint) -> None:
    stored = checkpoint.load_tensors(saved, "model")
    with torch.no_grad():
        for name, parameter in conversion.models.student.named_parameters():
            parameter.copy_(stored[name])


def _origin(conversion: Conversion) -> dict[str, Any]:
    """The origin of a run: a checkpoint of another origin is refused."""
    text = {name: corpus.fingerprint for name, corpus in conversion.corpora.items()}
    return {"identity": conversion.identity, "text": text}
