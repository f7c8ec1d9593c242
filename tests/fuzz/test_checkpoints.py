"""Checkpoints through anything: saves, kills inside saves, damage, full disks, clocks set wrong, second processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from mohawkify.errors import StorageError, UsageError
from mohawkify.files import atomic
from mohawkify.files.lock import run_lock
from mohawkify.run.checkpoint import list_checkpoints, load_tensors, newest_valid, rotate, save_checkpoint
from tests.files.faults import fault_at, killed_at, raise_error
from tests.fuzz import profile
from tests.fuzz.campaign import counted
from tests.fuzz.conftest import MEMORY

KEEP = 2
MOST_OPERATIONS = 60  # a save with its rotation has fewer
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def model_at(step: int) -> dict[str, Tensor]:
    """Other numbers for every step."""
    return {"weight": torch.full((2, 2), float(step)), "bias": torch.arange(2.0) + step}


def save(directory: Path, step: int) -> None:
    """Write the checkpoint of a step and delete old ones, as a run does."""
    save_checkpoint(
        directory, global_step=step, model_tensors=model_at(step), optimizer_tensors={}, state={"step": step}
    )
    rotate(directory, KEEP)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class Checkpoints(RuleBasedStateMachine):
    """A run's folder of checkpoints, and what is known of it from outside.

    `whole` holds the steps whose save came back and that nobody damaged since; `unsure` those whose save was killed or
    failed: they may be there or not.
    """

    seen: list[int]

    @initialize()
    def begin(self) -> None:
        """Start with no checkpoint."""
        self.run = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.directory = self.run / "checkpoints"
        self.directory.mkdir()
        self.step = 0
        self.whole: set[int] = set()
        self.unsure: set[int] = set()
        self.damaged: set[int] = set()
        self.seen.append(1)

    def teardown(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.run)

    @rule(steps=st.integers(1, 3))
    def save_next(self, steps: int) -> None:
        """Train and save."""
        self.step += steps
        save(self.directory, self.step)
        self._is_saved(self.step)

    @precondition(lambda self: self.step > 0)
    @rule()
    def save_again(self) -> None:
        """The same step again, as after a resume."""
        save(self.directory, self.step)
        self._is_saved(self.step)

    @rule(index=st.integers(0, MOST_OPERATIONS))
    def save_killed(self, index: int) -> None:
        """A kill somewhere in the save or in the rotation after it; a new process takes over."""
        self.step += 1
        before = self._folder_number()
        if killed_at(index, lambda: save(self.directory, self.step)):
            self._may_be_saved(before)
            self._take_over()
        else:
            self._is_saved(self.step)

    @rule(index=st.integers(0, MOST_OPERATIONS), number=st.sampled_from(FULL))
    def save_refused(self, index: int, number: int) -> None:
        """The disk is full, or broken, from one operation on."""
        self.step += 1
        before = self._folder_number()
        try:
            with fault_at(index, raise_error(number)):
                save(self.directory, self.step)
            self._is_saved(self.step)
        except StorageError:
            self._may_be_saved(before)

    @precondition(lambda self: self._undamaged())
    @rule(
        which=st.integers(0, 9), file=st.integers(0, 9), how=st.sampled_from(("flip", "cut", "delete", "add", "zero"))
    )
    def damage(self, which: int, file: int, how: str) -> None:
        """One file of one checkpoint is changed, cut, deleted or joined by another."""
        paths = self._undamaged()
        path = paths[-1 - which % len(paths)]
        files = sorted(entry for entry in path.iterdir())
        target = files[file % len(files)]
        data = target.read_bytes()
        if how == "flip":
            target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif how == "cut":
            target.write_bytes(data[: len(data) // 2])
        elif how == "delete":
            target.unlink()
        elif how == "zero":
            target.write_bytes(bytes(len(data)))
        else:
            (path / "other").write_bytes(b"")
        step = _step_of(path)
        self.damaged.add(step)
        self.whole.discard(step)
        self.unsure.discard(step)

    @rule(seed=st.integers(0, 99))
    def set_clocks(self, seed: int) -> None:
        """Times of change mean nothing."""
        generator = random.Random(seed)
        for path in list_checkpoints(self.directory):
            time = generator.choice((0, 1, 2**31, generator.randrange(2**32)))
            os.utime(path, (time, time))

    @rule()
    def second_process(self) -> None:
        """Another process is refused while one holds the folder, and welcome afterwards."""
        with run_lock(self.run):
            assert not self._can_lock()
        assert self._can_lock()

    @rule()
    def resume(self) -> None:
        """A new process continues from the newest valid checkpoint, and goes back no further."""
        self._take_over()
        found = newest_valid(self.directory, lambda line: None)
        newest = max(self.whole, default=0)
        step = 0 if found is None else found.global_step
        assert step >= newest, "the step went back past the newest valid checkpoint"
        assert step not in self.damaged
        assert step in self.whole | self.unsure | {0}
        if found is not None:
            assert found.state == {"step": step}
            tensors = load_tensors(found, "model")
            assert tensors.keys() == model_at(step).keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in model_at(step).items())
            self.whole.add(step)
        self.unsure = {each for each in self.unsure if each < step}
        self.step = step

    @invariant()
    def one_survives(self) -> None:
        """What was committed and not damaged is found."""
        if not getattr(self, "whole", None):
            return
        names = {path.name for path in list_checkpoints(self.directory)}
        assert f"step-{max(self.whole):08d}" in names

    def _undamaged(self) -> list[Path]:
        """Folders that nobody has changed; changing one twice could bring it back."""
        return [path for path in list_checkpoints(self.directory) if _step_of(path) not in self.damaged]

    def _is_saved(self, step: int) -> None:
        """After a save and its rotation: the step is whole, the disk holds no more than it should."""
        self.damaged.discard(step)
        self.unsure.discard(step)
        self.whole.add(step)
        present = {_step_of(path) for path in list_checkpoints(self.directory)}
        assert {step} <= present
        self.whole &= present
        self.unsure &= present
        self.damaged &= present
        assert len(present - self.damaged) <= KEEP, "more checkpoints than are kept"
        assert len(self.whole) >= 1

    def _folder_number(self) -> int | None:
        """What tells the folder of this step from another in its place; None without one."""
        path = self.directory / f"step-{self.step:08d}"
        return path.stat().st_ino if path.exists() else None

    def _may_be_saved(self, before: int | None) -> None:
        """After a save that did not end well: a damaged folder of the same step may have been replaced, or not."""
        if self._folder_number() != before:
            self.damaged.discard(self.step)
        if self.step not in self.damaged:
            self.unsure.add(self.step)
        self._may_have_rotated()

    def _may_have_rotated(self) -> None:
        """A save that did not end well may have deleted old checkpoints, if enough newer ones are there."""
        present = {_step_of(path) for path in list_checkpoints(self.directory)}
        for lost in self.whole - present:
            newer = [step for step in (self.whole | self.unsure) & present if step > lost]
            assert len(newer) >= KEEP, f"step {lost} is gone, and only {newer} are newer"
        self.whole &= present
        self.unsure &= present
        self.damaged &= present

    def _take_over(self) -> None:
        """What a new process does first; nothing half-written is left after it."""
        with run_lock(self.run):
            atomic.sweep_temporaries(self.directory)
        assert not list(self.directory.glob(".tmp-*"))
        present = {_step_of(path) for path in list_checkpoints(self.directory)}
        self.damaged &= present
        self.unsure &= present

    def _can_lock(self) -> bool:
        process = multiprocessing.get_context("fork").Process(target=_lock_or_fail, args=(self.run,))
        process.start()
        process.join()
        return process.exitcode == 0


def _lock_or_fail(run: Path) -> None:
    code = 1
    with suppress(UsageError), run_lock(run):
        code = 0
    os._exit(code)


def test_any_history() -> None:
    with counted("checkpoint-histories") as seen:
        Checkpoints.seen = seen
        run_state_machine_as_test(Checkpoints, settings=profile(25, stateful_step_count=15))


@pytest.fixture(scope="module")
def shelf() -> Iterator[Path]:
    """Checkpoints of the steps 1 to 5."""
    path = Path(tempfile.mkdtemp())
    for step in range(1, 6):
        save_checkpoint(path, global_step=step, model_tensors=model_at(step), optimizer_tensors={}, state={})
    yield path
    shutil.rmtree(path)


@given(times=st.lists(st.integers(0, 2**33), min_size=5, max_size=5))
@profile(100)
def test_the_order_is_that_of_steps_whatever_the_clock_says(shelf: Path, times: list[int]) -> None:
    for path, time in zip(sorted(shelf.iterdir()), times, strict=True):
        os.utime(path, (time, time))
    assert [_step_of(path) for path in list_checkpoints(shelf)] == [1, 2, 3, 4, 5]
    found = newest_valid(shelf, lambda line: None)
    assert found is not None
    assert found.global_step == 5
