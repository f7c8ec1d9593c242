"""A folder appears complete or not at all, any damage to it is found, and what a killed process left is cleared."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mohawkify import manifest
from mohawkify.errors import CheckpointError, NumericsError, StorageError, UsageError
from mohawkify.storage import atomic_directory, remove_directory, sweep_temporaries, verify_directory
from tests.faults import content_of, fault_at, killed_at, raise_error

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
    def test_sweep_takes_the_dead_and_leaves_the_living(self, tmp_path: Path) -> None:
        dead = dead_pid()
        abandoned = {f".tmp-folder-{dead}", f".tmp-file.json-{dead}", f".tmp-ours-{os.getpid()}"}
        kept = {f".tmp-live-{os.getppid()}", ".tmp-", ".tmp-x-notapid", "step-1"}
        for name in abandoned | kept:
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").touch()
        (tmp_path / f".tmp-plain-{dead}").touch()
        assert set(sweep_temporaries(tmp_path)) == abandoned | {f".tmp-plain-{dead}"}
        assert set(os.listdir(tmp_path)) == kept

    def test_sweep_of_a_missing_folder(self, tmp_path: Path) -> None:
        assert sweep_temporaries(tmp_path / "nowhere") == []

    def test_sweep_does_not_follow_links(self, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").touch()
        (tmp_path / f".tmp-x-{dead_pid()}").symlink_to(tmp_path / "precious")
        sweep_temporaries(tmp_path)
        assert content_of(tmp_path) == {"precious/file": b""}

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
