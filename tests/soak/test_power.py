"""Whatever of a save reaches the disk before the power fails, what counts as valid holds the right bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import CheckpointError
from mohawkify.files import atomic
from mohawkify.recipe.loading import parse_recipe
from mohawkify.run import checkpoint
from mohawkify.run.folder import RunFolder
from mohawkify.train.conversion import Conversion, ConvertOptions
from mohawkify.train.loop import StepReport
from mohawkify.train.saving import CheckpointWriter
from mohawkify.train.step_log import StepLog
from mohawkify.train.training_state import TrainingState
from mohawkify.train.watchdog import Watchdog
from tests.commands import RECIPE
from tests.files.faults import content_of
from tests.soak import SEED, chooser, trials
from tests.soak.disk import Disk, hash_of, recorded, write_out
from tests.soak.runs import Tally


def save(directory: Path, step: int) -> None:
    torch.manual_seed(step)
    tensors = {"weight": torch.randn(4, 3), "bias": torch.randn(3)}
    checkpoint.save_checkpoint(
        directory, global_step=step, model_tensors=tensors, optimizer_tensors=tensors, state={"step": step}
    )


def survive(tally: Tally, top: Path, work: Callable[[], None], check: Callable[[Path, bool], None]) -> None:
    """Cut the power after every operation of some work on a folder, and look at every state that may be found.

    Args:
        tally: gets a trial for every state.
        top: the folder.
        work: changes it.
        check: fails for a state that must not be; it gets the folder and whether the work had ended.
    """
    model = Disk(top)
    with recorded(top) as operations:
        work()
    place, draw, seen = top.with_name(f"{top.name}-state"), chooser(f"P4 {top.name}", 0), set()
    tally.note("operations", len(operations))
    for number, operation in enumerate([None, *operations]):
        if operation is not None:
            model.do(operation)
        is_done = number == len(operations)
        for tree in model.states(draw, trials(2, 20)):
            key = (hash_of(tree), is_done)
            if key in seen:
                continue
            seen.add(key)
            with tally.trial(f"after operation {number} of seed {SEED}: {operation and operation[:2]}", place):
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                write_out(tree, place)
                check(place, is_done)


def test_p4_a_power_cut_during_save_and_rotation(tmp_path):
    top = tmp_path / "checkpoints"
    for step in (10, 20):
        save(top, step)
    right = {step: content_of(top / f"step-{step:08d}") for step in (10, 20)}
    save(tmp_path / "after", 30)
    right[30] = content_of(tmp_path / "after" / "step-00000030")

    def work() -> None:
        save(top, 30)
        checkpoint.rotate(top, keep=2)

    def check(place: Path, is_done: bool) -> None:
        found = checkpoint.newest_valid(place, lambda line: None)
        assert found is not None
        assert found.global_step in ((30,) if is_done else (20, 30))
        for path in checkpoint.list_checkpoints(place):
            step = int(path.name[5:])
            try:
                atomic.verify_directory(path)
            except CheckpointError:
                assert step != 20, "the previous checkpoint is damaged"
                continue
            assert content_of(path) == right[step], f"{path.name} counts as valid and holds other bytes"

    with Tally("P4", "power cut after every operation of save and rotation, unflushed writes lost") as tally:
        survive(tally, top, work, check)


def test_p4_a_power_cut_while_a_folder_or_a_file_is_written(tmp_path):
    top = tmp_path / "run"
    top.mkdir()
    atomic.write_json(top / "results.json", {"stages": {"init": 1}})
    old = (top / "results.json").read_bytes()
    atomic.write_json(tmp_path / "new.json", {"stages": {"init": 1, "orient": 2}})
    new = (tmp_path / "new.json").read_bytes()

    def work() -> None:
        atomic.write_json(top / "results.json", {"stages": {"init": 1, "orient": 2}})
        with atomic.atomic_directory(top / "final") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "code").mkdir()
            (folder / "code" / "model.py").write_text("pass\n")

    def check(place: Path, is_done: bool) -> None:
        assert (place / "results.json").read_bytes() in ((new,) if is_done else (old, new))
        if is_done or (place / "final").exists():
            atomic.verify_directory(place / "final")
            assert content_of(place / "final").keys() == {"config.json", "code/model.py", "manifest.json"}
            assert (place / "results.json").read_bytes() == new

    with Tally("P4", "power cut after every operation of results and final folder, unflushed writes lost") as tally:
        survive(tally, top, work, check)


def test_p4_a_power_cut_leaves_no_checkpoint_without_its_lines_of_the_log(tmp_path):
    top = tmp_path / "run"
    top.mkdir()
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    models, text, loaders = (None, None), ({}, []), (None, None, None)
    device, world = torch.device("cpu"), World()
    conversion = Conversion(
        RunFolder(top), recipe, ConvertOptions(), "identity", *models, *text, device, world, *loaders
    )  # type: ignore[arg-type]
    log, state = StepLog(conversion, 0), TrainingState(stage="orient")
    writer = CheckpointWriter(conversion, log, Shutdown(), 0)
    tensors = {group: {"weight": torch.ones(3)} for group in ("model", "optimizer")} | {"rng": {}}

    def work() -> None:
        for step in (1, 2, 3):
            state.stage_step = state.global_step = step
            log.add_step(StepReport(step, 16, 1e-3, 1.0, 0.1, {"loss": 2.5}), state, None)
            if step != 2:
                writer._write(tensors, state, Watchdog(0, "saving", World()))

    def check(place: Path, is_done: bool) -> None:
        found = checkpoint.newest_valid(place / "checkpoints", lambda line: None)
        saved = 0 if found is None else found.global_step
        assert saved == 3 or not is_done
        logged = [line["global_step"] for line in atomic.read_lines(place / "metrics.jsonl")]
        assert logged[:saved] == list(range(1, saved + 1)), f"a checkpoint of step {saved} beside the lines {logged}"

    with Tally("P4", "power cut after every operation of three steps and two saves") as tally:
        survive(tally, top, work, check)


def test_the_model_of_a_disk_knows_what_a_missing_flush_may_cost(tmp_path):
    top = tmp_path / "run"
    top.mkdir()
    (top / "file").write_bytes(b"old")
    model, found = Disk(top), set()
    with recorded(top) as operations:
        (top / ".tmp-file").write_bytes(b"new bytes")
        os.rename(top / ".tmp-file", top / "file")
    for operation in operations:
        model.do(operation)
        found |= {tree.get("file") for tree in model.states(chooser("model", 0))}
    assert found == {b"old", b"new bytes", b"", bytes(9), b"new "}
