"""A checkpoint comes back bit for bit or not at all, and a run always has one to continue from."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mohawkify.errors import CheckpointError, NumericsError, StorageError, UsageError
from mohawkify.files.atomic import sweep_temporaries, verify_directory
from mohawkify.run import checkpoint as checkpoint_module
from mohawkify.run.checkpoint import (
    list_checkpoints,
    load_tensors,
    newest_valid,
    restore_rng,
    rng_tensors,
    rotate,
    save_checkpoint,
)
from tests.files.faults import content_of, fault_at, killed_at, raise_error

STATE = {"stage": "align", "stage_step": 3, "tokens": 12_345_678_901, "loss": 1 / 3, "recipe": {"sha256": "00ff"}}


def model_at(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"layer.weight": torch.randn(4, 3, generator=generator), "layer.bias": torch.randn(3, generator=generator)}


def save(directory: Path, step: int) -> Path:
    model = model_at(step)
    moments = {f"{name}.moment": tensor.square() for name, tensor in model.items()}
    return save_checkpoint(
        directory, global_step=step, model_tensors=model, optimizer_tensors=moments, state={**STATE, "step": step}
    )


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    bits, expected_bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(bits, expected_bits)


def assert_holds_step(directory: Path, step: int) -> None:
    found = newest_valid(directory, pytest.fail)
    assert found is not None
    assert found.global_step == found.state["step"] == step
    for name, tensor in model_at(step).items():
        assert_same_bits(load_tensors(found, "model")[name], tensor)
        assert_same_bits(load_tensors(found, "optimizer")[f"{name}.moment"], tensor.square())


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


class TestRoundTrip:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        path = save(tmp_path / "checkpoints", 40)
        assert path == tmp_path / "checkpoints" / "step-00000040"
        assert names_in(path) == [
            "manifest.json",
            "model.safetensors",
            "optimizer.safetensors",
            "rng.safetensors",
            "state.json",
        ]
        assert_holds_step(tmp_path / "checkpoints", 40)
        found = newest_valid(tmp_path / "checkpoints", pytest.fail)
        assert found is not None
        assert found.path == path
        assert found.state == {**STATE, "step": 40}
        assert list(found.state) == [*STATE, "step"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_bits_of_unusual_numbers(self, tmp_path: Path, dtype: torch.dtype) -> None:
        limits = torch.finfo(dtype)
        tensor = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 4], dtype=dtype)
        save_checkpoint(tmp_path, global_step=1, model_tensors={"t": tensor}, optimizer_tensors={}, state={})
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        assert_same_bits(load_tensors(found, "model")["t"], tensor)
        assert load_tensors(found, "optimizer") == {}

    def test_any_layout_and_shared_memory(self, tmp_path: Path) -> None:
        base = torch.arange(24.0).reshape(4, 6)
        tensors = {
            "base": base,
            "tied": base,
            "transposed": base.T,
            "rows": base[1:3],
            "column": base[:, 2],
            "expanded": torch.tensor([[1.5]]).expand(3, 2),
            "scalar": torch.tensor(7, dtype=torch.int64),
            "empty": torch.empty(0, 4),
            "also empty": torch.empty(0),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
        save_checkpoint(tmp_path, global_step=1, model_tensors=tensors, optimizer_tensors=tensors, state={})
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        loaded = load_tensors(found, "model")
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert_same_bits(loaded[name], tensor.detach())

    def test_loaded_tensors_do_not_depend_on_the_files(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        model = dict(load_tensors(found, "model"))  # each is read now
        for file in path.iterdir():
            file.write_bytes(bytes(file.stat().st_size))
        for name, tensor in model_at(1).items():
            assert_same_bits(model[name], tensor)


class TestRefusals:
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["model", "optimizer"])
    def test_tensors_that_are_not_finite(self, tmp_path: Path, kind: str, dtype: torch.dtype, number: float) -> None:
        save(tmp_path, 1)
        bad = torch.zeros(5, 7, dtype=dtype)
        bad[3, 2] = number
        groups = {"model": {"fine": torch.ones(2)}, "optimizer": {"fine": torch.ones(2)}}
        groups[kind]["layer.bad"] = bad
        with pytest.raises(NumericsError, match=rf"the {kind} tensor layer\.bad"):
            save_checkpoint(
                tmp_path,
                global_step=2,
                model_tensors=groups["model"],
                optimizer_tensors=groups["optimizer"],
                state=STATE,
            )
        assert names_in(tmp_path) == ["step-00000001"]

    def test_a_state_that_is_not_finite(self, tmp_path: Path) -> None:
        with pytest.raises(NumericsError, match=r"state\.json"):
            save_checkpoint(
                tmp_path, global_step=2, model_tensors={}, optimizer_tensors={}, state={"loss": float("nan")}
            )
        assert names_in(tmp_path) == []

    def test_too_little_space_is_found_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mohawkify.files.disk.free_bytes", lambda directory: 100)
        with pytest.raises(StorageError, match="100 are free"):
            save(tmp_path, 1)
        assert names_in(tmp_path) == []

    def test_a_real_limit_on_file_size_keeps_the_previous_one(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"cannot write .*step-00000002: File too large"):
                save_checkpoint(
                    tmp_path, global_step=2, model_tensors={"t": torch.zeros(5000)}, optimizer_tensors={}, state={}
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names_in(tmp_path) == ["step-00000001"]
        assert_holds_step(tmp_path, 1)

    def test_a_path_that_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="Not a directory"):
            save(tmp_path / "file" / "checkpoints", 1)

    def test_a_failure_at_any_operation_keeps_the_previous_one(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        index = 0
        while True:
            with (
                fault_at(index, raise_error(errno.ENOSPC), ("open", "mkdir", "rename", "fsync", "fchmod")) as begun,
                suppress(StorageError),
            ):
                save(tmp_path, 2)
            if len(begun) <= index:
                break
            steps = [path.name for path in list_checkpoints(tmp_path)]
            assert names_in(tmp_path) == steps
            assert_holds_step(tmp_path, len(steps))
            shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
            index += 1
        assert index > 15
        assert_holds_step(tmp_path, 2)


class TestNewestValid:
    def test_none_yet(self, tmp_path: Path) -> None:
        assert newest_valid(tmp_path, pytest.fail) is None
        assert newest_valid(tmp_path / "missing", pytest.fail) is None

    def test_order_is_the_number_in_the_name_never_the_clock(self, tmp_path: Path) -> None:
        for seconds, step in enumerate((100, 9, 123_456_789, 99_999_999, 20)):
            os.utime(save(tmp_path, step), (1e9 - seconds * 1e6, 1e9 - seconds * 1e6))
        assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [9, 20, 100, 99_999_999, 123_456_789]
        assert_holds_step(tmp_path, 123_456_789)

    def test_other_names_are_not_checkpoints(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        for name in ("step-2", "step-00000003-old", "step-0000000x", ".tmp-step-00000004-1", "final"):
            (tmp_path / name).mkdir()
        (tmp_path / "step-00000005").touch()
        (tmp_path / "step-00000006").symlink_to(tmp_path / "step-00000001")
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]

    def test_falls_back_past_damaged_ones_says_so_and_leaves_them(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step)
        damage(tmp_path / "step-00000003" / "optimizer.safetensors")
        (tmp_path / "step-00000002" / "rng.safetensors").unlink()
        before = content_of(tmp_path)
        lines: list[str] = []
        found = newest_valid(tmp_path, lines.append)
        assert found is not None
        assert found.global_step == 1
        assert len(lines) == 2
        assert "step-00000003" in lines[0]
        assert "optimizer.safetensors has changed" in lines[0]
        assert "rng.safetensors is missing" in lines[1]
        assert content_of(tmp_path) == before

    def test_all_damaged(self, tmp_path: Path) -> None:
        damage(save(tmp_path, 1) / "model.safetensors")
        lines: list[str] = []
        assert newest_valid(tmp_path, lines.append) is None
        assert len(lines) == 1

    def test_damage_anywhere_is_found(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        path = save(tmp_path, 2)
        chooser = random.Random(0)
        for file in sorted(path.iterdir()):
            data = file.read_bytes()
            for _ in range(40):
                place = chooser.randrange(len(data))
                flipped = data[place] ^ (1 << chooser.randrange(8))
                for damaged in (data[:place], data[:place] + bytes([flipped]) + data[place + 1 :]):
                    file.write_bytes(damaged)
                    lines: list[str] = []
                    found = newest_valid(tmp_path, lines.append)
                    assert found is not None
                    assert found.global_step == 1
                    assert file.name in lines[0]
            file.write_bytes(data)
        assert_holds_step(tmp_path, 2)

    def test_a_checkpoint_under_the_name_of_another_step_is_refused(self, tmp_path: Path) -> None:
        save(tmp_path, 1).rename(tmp_path / "step-00000002")
        lines: list[str] = []
        assert newest_valid(tmp_path, lines.append) is None
        assert "written as the checkpoint of step 1" in lines[0]

    def test_a_newer_format_stops_the_run_instead_of_being_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, "_FORMAT", 2)
            save(tmp_path, 2)
        for attempt in (
            lambda: newest_valid(tmp_path, pytest.fail),
            lambda: rotate(tmp_path, keep=1),
            lambda: save(tmp_path, 2),
        ):
            with pytest.raises(UsageError, match="format 2"):
                attempt()
        verify_directory(tmp_path / "step-00000002")

    def test_a_file_that_vanishes_after_the_check(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        (path / "model.safetensors").write_bytes(b"short")
        (path / "rng.safetensors").unlink()
        for group in ("model", "rng"):
            with pytest.raises(CheckpointError, match=rf"{group}\.safetensors"):
                load_tensors(found, group)  # type: ignore[arg-type]


class TestRotation:
    def test_keeps_the_newest_by_number_not_by_time(self, tmp_path: Path) -> None:
        for seconds, step in enumerate((30, 10, 40, 20)):
            os.utime(save(tmp_path, step), (seconds * 1e6, seconds * 1e6))
        rotate(tmp_path, keep=2)
        assert names_in(tmp_path) == ["step-00000030", "step-00000040"]
        assert_holds_step(tmp_path, 40)

    def test_few_enough_are_left_alone(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        rotate(tmp_path, keep=1)
        rotate(tmp_path / "missing", keep=1)
        assert names_in(tmp_path) == ["step-00000001"]

    def test_a_damaged_one_does_not_count_as_kept(self, tmp_path: Path) -> None:
        for step in (1, 2, 3, 4):
            save(tmp_path, step)
        damage(tmp_path / "step-00000004" / "model.safetensors")
        rotate(tmp_path, keep=2)
        assert names_in(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]

    def test_with_every_newer_one_damaged_the_last_good_one_stays(self, tmp_path: Path) -> None:
        for step in (1, 2, 3, 4):
            save(tmp_path, step)
        for step in (2, 3, 4):
            damage(tmp_path / f"step-{step:08d}" / "state.json")
        rotate(tmp_path, keep=1)
        assert "step-00000001" in names_in(tmp_path)

    def test_at_least_one_must_be_kept(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        with pytest.raises(ValueError, match="at least one"):
            rotate(tmp_path, keep=0)
        assert names_in(tmp_path) == ["step-00000001"]

    def test_a_kill_at_any_operation_of_save_and_rotate_is_recoverable(self, tmp_path: Path) -> None:
        def work(directory: Path) -> None:
            sweep_temporaries(directory)
            save(directory, 30)
            rotate(directory, keep=2)

        for step in (10, 20):
            save(tmp_path / "start", step)
        newest: list[int] = []
        while True:
            directory = tmp_path / str(len(newest))
            shutil.copytree(tmp_path / "start", directory)
            if not killed_at(len(newest), lambda directory=directory: work(directory)):  # type: ignore[misc]
                break
            found = newest_valid(directory, pytest.fail)
            assert found is not None
            newest.append(found.global_step)
            assert_holds_step(directory, found.global_step)
            work(directory)
            assert names_in(directory) == ["step-00000020", "step-00000030"]
        assert newest == sorted(newest)
        assert newest.count(20) > 15
        assert newest.count(30) > 5


class TestRedoneStep:
    def test_a_valid_one_is_kept(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        before = {file.name: file.stat().st_ino for file in path.iterdir()}
        assert save(tmp_path, 1) == path
        assert {file.name: file.stat().st_ino for file in path.iterdir()} == before

    def test_a_damaged_one_is_replaced(self, tmp_path: Path) -> None:
        damage(save(tmp_path, 1) / "model.safetensors")
        (tmp_path / "step-00000001" / "extra").touch()
        save(tmp_path, 1)
        assert names_in(tmp_path) == ["step-00000001"]
        assert_holds_step(tmp_path, 1)


class TestRandomState:
    def test_the_numbers_after_a_checkpoint_repeat(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        torch.rand(3)
        save(tmp_path, 1)
        expected = [torch.rand(7), torch.randn(3), torch.randperm(20)]
        torch.manual_seed(6)
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        restore_rng(load_tensors(found, "rng"))
        for tensor, again in zip(expected, [torch.rand(7), torch.randn(3), torch.randperm(20)], strict=True):
            assert_same_bits(again, tensor)

    def test_a_missing_or_foreign_state_is_refused_and_changes_nothing(self) -> None:
        before = torch.get_rng_state()
        for tensors in ({}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}):
            with pytest.raises(CheckpointError, match="random"):
                restore_rng(tensors)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_device_that_is_not_here_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            restore_rng({**rng_tensors(), "cuda.99": torch.zeros(16, dtype=torch.uint8)})
        assert [record.message for record in caplog.records] == [
            "the random state of cuda.99 is not restored: this machine has no such device"
        ]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_numbers_repeat(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        torch.rand(3, device="cuda")
        save(tmp_path, 1)
        expected = torch.randn(9, device="cuda")
        found = newest_valid(tmp_path, pytest.fail)
        assert found is not None
        restore_rng(load_tensors(found, "rng"))
        assert_same_bits(torch.randn(9, device="cuda").cpu(), expected.cpu())
        restore_rng({"cpu": torch.get_rng_state()})
        assert "starts anew" in caplog.text
