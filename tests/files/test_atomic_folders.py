"""A folder appears complete or not at all, any damage to it is found, and what a killed process left is cleared."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mohawkify.errors import CheckpointError, DiskFullError, NumericsError, StorageError, UsageError
from mohawkify.files import atomic, disk, manifest
from mohawkify.files.atomic import atomic_directory, remove_directory, sweep_temporaries, verify_directory
from tests.bytes_tokenizer import bytes_tokenizer
from tests.files.faults import content_of, fault_at, killed_at, raise_error

FAILING_OPERATIONS = ("open", "mkdir", "rename", "fsync", "fchmod")
FILES = {"weights.bin": bytes(range(256)) * 3, "config.json": b'{"a": 1}\n', "nested/deeper/empty.txt": b""}


def write_files(folder: Path) -> None:
    (folder / "nested" / "deeper").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)


def make_folder(target: Path) -> Path:
    with atomic_directory(target, facts={"step": 7, "loss": 0.1}) as folder:
        write_files(folder)
    return target


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestAtomicDirectory:
    def test_folder_and_manifest(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "new" / "parents" / "out")
        content = content_of(target)
        manifest = json.loads(content.pop("manifest.json"))
        assert content == FILES
        assert manifest["facts"] == {"step": 7, "loss": 0.1}
        assert {name: file["bytes"] for name, file in manifest["files"].items()} == {
            name: len(data) for name, data in FILES.items()
        }
        assert verify_directory(target) == manifest
        assert os.listdir(target.parent) == ["out"]

    def test_without_a_manifest(self, tmp_path: Path) -> None:
        with atomic_directory(tmp_path / "out", manifest=False) as folder:
            write_files(folder)
        assert content_of(tmp_path / "out") == FILES

    def test_facts_may_be_filled_in_by_the_block(self, tmp_path: Path) -> None:
        facts = {"kl": 0.0}
        with atomic_directory(tmp_path / "out", facts=facts):
            facts["kl"] = 0.25
        assert verify_directory(tmp_path / "out")["facts"] == {"kl": 0.25}

    def test_private_files_get_the_permissions_of_the_folder(self, tmp_path: Path) -> None:
        with atomic_directory(tmp_path / "out") as folder:
            write_files(folder)
            (folder / "weights.bin").chmod(0o600)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert modes == {stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o666}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_an_exception_in_the_block_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        def make_half() -> None:
            with atomic_directory(tmp_path / "out") as folder:
                write_files(folder)
                raise error

        with pytest.raises(error):
            make_half()
        assert os.listdir(tmp_path) == []

    def test_an_error_of_the_system_in_the_block_becomes_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError) as caught, atomic_directory(tmp_path / "out"):
            raise_error(errno.ENOSPC)()
        wanted = rf"cannot write {re.escape(str(tmp_path / 'out'))}: No space left on device; [\d,]+ bytes are free"
        assert re.fullmatch(wanted, caught.value.message)
        assert caught.value.hint is not None
        assert os.listdir(tmp_path) == []

    def test_a_library_error_derived_from_oserror_passes_as_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="the hub says no"), atomic_directory(tmp_path / "out"):
            raise OSError("the hub says no")

    def test_an_empty_target_is_used_and_a_full_one_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        make_folder(tmp_path / "empty")
        before = content_of(tmp_path)
        with pytest.raises(StorageError, match="empty is not empty"), atomic_directory(tmp_path / "empty"):
            pytest.fail("the block must not begin")
        assert content_of(tmp_path) == before

    def test_a_target_that_fills_up_meanwhile_is_not_overwritten(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="not empty"), atomic_directory(tmp_path / "out"):
            write_files(tmp_path / "out")
        assert content_of(tmp_path / "out") == FILES
        assert os.listdir(tmp_path) == ["out"]

    def test_a_file_or_a_link_in_the_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        for name in ("file", "link"):
            with pytest.raises(StorageError, match=f"{name} is not a folder"), atomic_directory(tmp_path / name):
                pytest.fail("the block must not begin")

    @pytest.mark.parametrize("manifest", [True, False])
    def test_links_are_refused(self, tmp_path: Path, manifest: bool) -> None:
        (tmp_path / "secret").write_text("x")
        (tmp_path / "secret").chmod(0o600)
        with pytest.raises(StorageError), atomic_directory(tmp_path / "out", manifest=manifest) as folder:
            (folder / "link").symlink_to(tmp_path / "secret")
        assert os.listdir(tmp_path) == ["secret"]
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600

    def test_the_manifest_refuses_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        with pytest.raises(NumericsError), atomic_directory(tmp_path / "out", facts={"kl": float("nan")}):
            pass
        assert os.listdir(tmp_path) == []

    def test_a_failure_at_any_operation_leaves_nothing_or_all(self, tmp_path: Path) -> None:
        index = 0
        outcomes = []
        while True:
            target = tmp_path / str(index) / "out"
            with fault_at(index, raise_error(errno.ENOSPC), FAILING_OPERATIONS) as begun, suppress(StorageError):
                make_folder(target)
            if len(begun) <= index:
                break
            assert list(tmp_path.rglob(".tmp-*")) == []
            if target.exists():
                verify_directory(target)
            outcomes.append(target.exists())
            index += 1
        assert outcomes == [False] * (index - 2) + [True] * 2  # only flushing the rename (open, fsync) comes after it
        assert index > 20

    def test_a_kill_at_any_operation_is_recoverable(self, tmp_path: Path) -> None:
        index = 0
        incomplete = 0
        while True:
            target = tmp_path / str(index) / "out"
            if not killed_at(index, lambda target=target: make_folder(target)):  # type: ignore[misc]
                break
            if target.exists():
                verify_directory(target)
            else:
                incomplete += 1
                sweep_temporaries(tmp_path)
                sweep_temporaries(target.parent)
                make_folder(target)
            assert list(tmp_path.rglob(".tmp-*")) == []
            assert content_of(target).keys() == FILES.keys() | {"manifest.json"}
            index += 1
        assert incomplete > 20

    def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[tuple[str, str]] = []
        real_fsync, real_rename = os.fsync, os.rename

        def fsync(handle: int) -> None:
            events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
            real_fsync(handle)

        def rename(source: Path, target: Path) -> None:
            events.append(("rename", str(target)))
            real_rename(source, target)

        if not Path("/proc/self/fd").exists():
            pytest.skip("needs /proc to name what is flushed")
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        target = make_folder(tmp_path / "out")
        monkeypatch.undo()
        place = events.index(("rename", str(target)))
        temporary = tmp_path / f".tmp-out-{os.getpid()}"
        names = [*FILES, "manifest.json", "nested", "nested/deeper", "."]
        assert {path for _, path in events[:place]} == {str(temporary / name) for name in names}
        assert events[place + 1 :] == [("fsync", str(tmp_path))]

    def test_a_leftover_under_our_own_number_is_replaced(self, tmp_path: Path) -> None:
        stale = tmp_path / f".tmp-out-{os.getpid()}"
        stale.mkdir()
        (stale / "half").touch()
        assert "half" not in content_of(make_folder(tmp_path / "out"))

    def test_too_little_space_is_found_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk, "free_bytes", lambda directory: 1_000)
        with atomic_directory(tmp_path / "fits", needed=1_000) as folder:
            write_files(folder)
        target = tmp_path / "no" / "room"
        with (
            pytest.raises(DiskFullError, match=rf"{target} needs 1,001 bytes, 1,000 are free"),
            atomic_directory(target, needed=1_001),
        ):
            pytest.fail("the block must not begin")
        assert os.listdir(tmp_path) == ["fits"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_names_what_is_needed_and_free(self, tmp_path: Path, number: int) -> None:
        with pytest.raises(DiskFullError) as caught, atomic_directory(tmp_path / "out", needed=1_234):
            raise_error(number)()
        wanted = rf"cannot write {tmp_path}/out: {os.strerror(number)}; 1,234 bytes are needed, [\d,]+ are free"
        assert re.fullmatch(wanted, caught.value.message)


@contextmanager
def limited(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(5_000)}, folder / "model.safetensors")


def write_tokenizer(folder: Path) -> None:
    bytes_tokenizer().save_pretrained(folder)


def write_mlx_tensors(folder: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install 'mohawkify[mlx]'")
    mx.save_safetensors(str(folder / "model.safetensors"), {"weight": mx.zeros(5_000)})


class TestLibraries:
    """What the system refuses a library that writes inside the folder, in that library's own words."""

    @pytest.mark.parametrize(
        ("write", "reason"),
        [
            (write_tensors, "File too large"),
            (write_tokenizer, "File too large"),
            (write_mlx_tensors, r"\[write\] Unable to write [\d,]+ bytes to file\.; [\d,]+ bytes are free"),
        ],
        ids=["safetensors", "tokenizers", "mlx"],
    )
    def test_a_real_limit_on_file_size(self, tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
        with pytest.raises(StorageError) as caught, atomic_directory(tmp_path / "out") as folder, limited(1_000):
            write(folder)
        assert re.fullmatch(rf"cannot write {tmp_path}/out: {reason}", caught.value.message)
        assert "ulimit" in str(caught.value.hint)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_in_words_is_a_full_disk(self, tmp_path: Path, number: int) -> None:
        told = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        for error in (SafetensorError(told), Exception(told)):
            with (
                pytest.raises(DiskFullError, match="9 bytes are needed, "),
                atomic_directory(tmp_path / "out", needed=9),
            ):
                raise error
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        "error",
        [
            SafetensorError("Error while deserializing header"),
            Exception("a tokenizer that cannot be written"),
            RuntimeError("the network broke (os error 104)"),
            RuntimeError("[matmul] Last dimension of first input must match"),
            CheckpointError("the student could not be loaded: No such file (os error 2)"),
        ],
        ids=str,
    )
    def test_any_other_error_passes_as_it_is(self, tmp_path: Path, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "out"):
            raise error
        assert caught.value is error


class TestVerify:
    def test_flipped_bits_are_found(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "out")
        chooser = random.Random(0)
        found = 0
        for path in sorted(path for path in target.rglob("*") if path.is_file()):
            data = path.read_bytes()
            for place in range(0, len(data), 3):
                damaged = bytearray(data)
                damaged[place] ^= 1 << chooser.randrange(8)
                path.write_bytes(damaged)
                with pytest.raises(CheckpointError, match=path.name):
                    verify_directory(target)
                found += 1
            path.write_bytes(data)
        assert found > 400
        verify_directory(target)

    def test_truncations_and_zeroed_tails_are_found(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "out")
        for name in ("weights.bin", "config.json", "manifest.json"):
            data = (target / name).read_bytes()
            for size in range(0, len(data), 7):
                for damaged in (data[:size], data[:size] + bytes(len(data) - size)):
                    if damaged == data:
                        continue
                    (target / name).write_bytes(damaged)
                    with pytest.raises(CheckpointError, match=name):
                        verify_directory(target)
            (target / name).write_bytes(data)

    @pytest.mark.parametrize("name", ["manifest.json", "weights.bin", "nested/deeper/empty.txt"])
    def test_a_deleted_file_is_found(self, tmp_path: Path, name: str) -> None:
        target = make_folder(tmp_path / "out")
        (target / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_directory(target)

    @pytest.mark.parametrize("name", ["extra.py", "nested/extra.bin"])
    def test_an_extra_file_is_found(self, tmp_path: Path, name: str) -> None:
        target = make_folder(tmp_path / "out")
        (target / name).touch()
        with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
            verify_directory(target)

    def test_swapped_files_are_found(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "out")
        (target / "weights.bin").rename(tmp_path / "aside")
        (target / "config.json").rename(target / "weights.bin")
        (tmp_path / "aside").rename(target / "config.json")
        with pytest.raises(CheckpointError, match=r"config\.json has changed"):
            verify_directory(target)

    def test_a_link_to_the_same_bytes_is_refused(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "out")
        (target / "weights.bin").rename(tmp_path / "elsewhere")
        (target / "weights.bin").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=r"not a plain file .*weights\.bin"):
            verify_directory(target)

    def test_a_linked_folder_is_refused(self, tmp_path: Path) -> None:
        target = make_folder(tmp_path / "out")
        (tmp_path / "elsewhere").mkdir()
        (target / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match="link is not in the manifest"):
            verify_directory(target)

    def test_a_newer_manifest_is_refused_but_not_called_damaged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(manifest, "_VERSION", 2)
        target = make_folder(tmp_path / "out")
        monkeypatch.undo()
        with pytest.raises(UsageError, match="has version 2"):
            verify_directory(target)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', '{"format": "mohawkify-manifest"}', "null"])
    def test_a_manifest_of_another_kind_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_directory(tmp_path)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No such file"):
            verify_directory(tmp_path / "nowhere")


class TestTemporaries:
    @pytest.mark.parametrize("alone", [False, True])
    def test_sweep_takes_the_dead_and_where_it_is_alone_the_living(self, tmp_path: Path, alone: bool) -> None:
        dead = dead_pid()
        abandoned = {f".tmp-folder-{dead}", f".tmp-file.json-{dead}", f".tmp-ours-{os.getpid()}"}
        living = {f".tmp-live-{os.getppid()}", ".tmp-first-1"}
        kept = {".tmp-", ".tmp-x-notapid", "step-1"}
        abandoned, kept = (abandoned | living, kept) if alone else (abandoned, kept | living)
        for name in abandoned | kept:
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").touch()
        (tmp_path / f".tmp-plain-{dead}").touch()
        assert set(sweep_temporaries(tmp_path, alone=alone)) == abandoned | {f".tmp-plain-{dead}"}
        assert set(os.listdir(tmp_path)) == kept

    def test_sweep_of_a_missing_folder(self, tmp_path: Path) -> None:
        assert sweep_temporaries(tmp_path / "nowhere") == []

    def test_sweep_does_not_follow_links(self, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").touch()
        (tmp_path / f".tmp-x-{dead_pid()}").symlink_to(tmp_path / "precious")
        sweep_temporaries(tmp_path)
        assert content_of(tmp_path) == {"precious/file": b""}

    def test_a_target_s_own_leftovers_go_before_it_is_written_or_removed(self, tmp_path: Path) -> None:
        work: list[Callable[[Path], object]] = [
            make_folder,
            remove_directory,
            lambda target: atomic.write_bytes(target, b"x"),
        ]
        for number, do in enumerate(work):
            place = tmp_path / str(number)
            dead = dead_pid()
            kept = {f".tmp-out-{os.getppid()}", f".tmp-out-2-{dead}", f".tmp-other-{dead}", ".tmp-out-notapid"}
            for name in {f".tmp-out-{dead}", f".tmp-out-{os.getpid()}"} | kept:
                (place / name).mkdir(parents=True)
                (place / name / "half").touch()
            if do is remove_directory:
                (place / "out").mkdir()
            do(place / "out")
            assert {name for name in os.listdir(place) if name.startswith(".tmp-")} == kept

    def test_a_killed_writer_s_leftover_goes_at_the_next_try(self, tmp_path: Path) -> None:
        for index in range(8):
            assert killed_at(index, lambda: make_folder(tmp_path / "out"))
        make_folder(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]

    def test_a_folder_is_removed_whole_at_any_kill(self, tmp_path: Path) -> None:
        index = 0
        while True:
            target = make_folder(tmp_path / str(index))
            if not killed_at(index, lambda target=target: remove_directory(target)):  # type: ignore[misc]
                break
            if target.exists():
                verify_directory(target)
                remove_directory(target)
            sweep_temporaries(tmp_path)
            assert os.listdir(tmp_path) == []
            index += 1
        assert index > 5


def test_a_name_that_is_no_utf8_is_refused_before_anything_is_written(tmp_path):
    for write in (atomic.ensure_writable, lambda path: atomic.atomic_directory(path).__enter__()):
        with pytest.raises(StorageError, match="is no UTF-8 name, as libraries that write weights need it"):
            write(tmp_path / "n\udce9" / "run")
    assert list(tmp_path.iterdir()) == []
