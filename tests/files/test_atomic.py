"""A file is complete or as it was, whatever goes wrong; a log loses no whole line; one process works in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mohawkify.errors import CheckpointError, NumericsError, StorageError, UsageError
from mohawkify.files import disk
from mohawkify.files.atomic import (
    append_line,
    atomic_directory,
    ensure_writable,
    file_sha256,
    read_json,
    read_lines,
    remove_directory,
    write_bytes,
    write_json,
    write_text,
)
from mohawkify.files.disk import free_bytes, require_space
from mohawkify.files.lock import LOCK_NAME, run_lock
from tests.files.faults import content_of, fault_at, killed_at, raise_error


def start_holder(directory: Path) -> subprocess.Popen[str]:
    """Start a process that locks the folder and stays; return once it holds the lock."""
    script = (
        "import sys, time, pathlib; from mohawkify.files.lock import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


class TestFiles:
    def test_written_bytes_come_back(self, tmp_path: Path) -> None:
        write_bytes(tmp_path / "a", b"old")
        write_bytes(tmp_path / "a", b"\x00new\xff")
        write_text(tmp_path / "b", "füße\r\n")
        assert content_of(tmp_path) == {"a": b"\x00new\xff", "b": "füße\r\n".encode()}

    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        write_bytes(tmp_path / "ours", b"x")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_text(Path("a"), "x")
        assert content_of(tmp_path) == {"a": b"x"}

    def test_json_round_trip_keeps_order_and_every_bit(self, tmp_path: Path) -> None:
        value = {"z": [1, 2.5, None, True], "a": {"tiny": 5e-324, "third": 1 / 3, "big": 2**70, "text": "ß\ud800"}}
        write_json(tmp_path / "v.json", value)
        assert read_json(tmp_path / "v.json") == value
        assert list(read_json(tmp_path / "v.json")) == ["z", "a"]
        assert (tmp_path / "v.json").read_text().startswith('{\n  "z": [\n')
        assert (tmp_path / "v.json").read_text().endswith("}\n")

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
    def test_json_refuses_numbers_that_are_not_finite(self, tmp_path: Path, number: float) -> None:
        write_json(tmp_path / "v.json", {"a": 1})
        with pytest.raises(NumericsError, match=r"v\.json"):
            write_json(tmp_path / "v.json", {"deep": [{"er": number}]})
        assert content_of(tmp_path) == {"v.json": b'{\n  "a": 1\n}\n'}

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            '{"a": NaN}',
            '{"a": [Infinity]}',
            '{"a": -Infinity}',
            '{"a": 1e999}',
            '{"a": 1, "a": 1}',
            '{"b": {"a": 1, "c": 2, "a": 3}}',
            "{} {}",
            "{'a': 1}",
            "[" * 100_000,
            "9" * 5_000,
        ],
        ids=lambda text: text[:12],
    )
    def test_read_json_is_strict(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"v\.json is not strict JSON"):
            read_json(tmp_path / "v.json")

    def test_read_json_refuses_bytes_that_are_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "v.json").write_bytes(b'{"a": "\xff"}')
        with pytest.raises(CheckpointError, match=r"v\.json"):
            read_json(tmp_path / "v.json")

    def test_read_json_of_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"cannot read .*v\.json: No such file"):
            read_json(tmp_path / "v.json")

    def test_file_sha256(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180-2
        assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_a_failure_before_the_rename_keeps_the_old_file(self, tmp_path: Path, number: int) -> None:
        write_bytes(tmp_path / "a", b"old")
        for operation in ("fsync", "rename"):
            with (
                fault_at(0, raise_error(number), (operation,)),
                pytest.raises(StorageError, match=os.strerror(number)) as caught,
            ):
                write_bytes(tmp_path / "a", b"new")
            assert str(tmp_path / "a") in caught.value.message
            assert content_of(tmp_path) == {"a": b"old"}

    def test_a_kill_at_any_operation_leaves_the_old_file_or_the_new(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        kills = 0
        seen = set()
        while True:
            write_bytes(path, b"old")
            if not killed_at(kills, lambda: write_bytes(path, b"new")):
                break
            kills += 1
            seen.add(path.read_bytes())
        assert kills >= 4
        assert seen == {b"old", b"new"}

    def test_a_real_limit_on_file_size_keeps_the_old_file(self, tmp_path: Path) -> None:
        script = (
            "import pathlib, resource, sys; from mohawkify.errors import StorageError;"
            "from mohawkify.files import atomic\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
            "try: atomic.write_bytes(pathlib.Path(sys.argv[1]), bytes(1_000_000))\n"
            "except StorageError as error: print(error.message); print(error.hint)"
        )
        write_bytes(tmp_path / "a", b"old")
        command = [sys.executable, "-c", script, str(tmp_path / "a")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        message, hint = result.stdout.splitlines()
        assert message == f"cannot write {tmp_path / 'a'}: File too large"
        assert "ulimit" in hint
        assert content_of(tmp_path) == {"a": b"old"}


class TestLog:
    def test_records_come_back_in_order(self, tmp_path: Path) -> None:
        records = [{"step": step, "loss": step / 3} for step in range(5)]
        for record in records:
            append_line(tmp_path / "log", record)
        assert read_lines(tmp_path / "log") == records

    def test_a_log_that_was_never_written_is_empty(self, tmp_path: Path) -> None:
        assert read_lines(tmp_path / "log") == []

    def test_numbers_that_are_not_finite_are_shown_and_strict_json(self, tmp_path: Path) -> None:
        record = {"loss": float("nan"), "norms": [float("inf"), 1.0, (float("-inf"),)], "by": {"layer": float("nan")}}
        append_line(tmp_path / "log", record)
        (found,) = read_lines(tmp_path / "log")
        assert found == {"loss": "nan", "norms": ["inf", 1.0, ["-inf"]], "by": {"layer": "nan"}}
        assert float(found["norms"][0]) == float("inf")

    def test_a_tear_at_any_byte_costs_only_the_torn_record(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        append_line(path, {"step": 1})
        whole = path.stat().st_size
        append_line(path, {"step": 2, "text": "ß"})
        data = path.read_bytes()
        for size in range(whole, len(data)):
            path.write_bytes(data[:size])
            assert read_lines(path) == [{"step": 1}]
            append_line(path, {"step": 2})
            append_line(path, {"step": 3})
            assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]

    def test_a_tear_in_the_first_line(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_bytes(b'{"st')
        assert read_lines(tmp_path / "log") == []
        append_line(tmp_path / "log", {"step": 1})
        assert read_lines(tmp_path / "log") == [{"step": 1}]

    @pytest.mark.parametrize("line", [b'{"step": ', b"[1]", b"", b"\x00\x00", b'{"a": NaN}'])
    def test_damage_before_the_end_is_named(self, tmp_path: Path, line: bytes) -> None:
        (tmp_path / "log").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
        with pytest.raises(CheckpointError, match="log, line 2,"):
            read_lines(tmp_path / "log")

    def test_a_full_disk_leaves_the_log_as_it_was(self, tmp_path: Path) -> None:
        script = (
            "import pathlib, resource, sys; from mohawkify.errors import StorageError;"
            "from mohawkify.files import atomic\n"
            "path = pathlib.Path(sys.argv[1]); atomic.append_line(path, {'step': 1})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
            "try: atomic.append_line(path, {'step': 2, 'text': 'x' * 200})\n"
            "except StorageError as error: print(error.message)"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "log")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout == f"cannot append to {tmp_path / 'log'}: File too large\n"
        assert (tmp_path / "log").read_bytes() == b'{"step": 1}\n'


class TestLock:
    def test_a_second_process_is_refused_at_once_and_named_the_first(self, tmp_path: Path) -> None:
        holder = start_holder(tmp_path / "run")
        try:
            start = time.monotonic()
            with (
                pytest.raises(UsageError, match=rf"another process \(pid {holder.pid}\) is working in .*run"),
                run_lock(tmp_path / "run"),
            ):
                pytest.fail("the block must not begin")
            assert time.monotonic() - start < 1.0
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        with run_lock(tmp_path / "run"):
            pass

    def test_the_same_process_cannot_take_it_twice_but_again(self, tmp_path: Path) -> None:
        for _ in range(2):
            with (
                run_lock(tmp_path),
                pytest.raises(UsageError, match=f"pid {os.getpid()}"),
                run_lock(tmp_path),
            ):
                pytest.fail("the block must not begin")

    def test_an_exception_frees_it_and_passes_unchanged(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="mine"), run_lock(tmp_path):
            raise FileNotFoundError(errno.ENOENT, "mine")
        with run_lock(tmp_path):
            pass

    def test_of_several_processes_at_once_one_wins(self, tmp_path: Path) -> None:
        script = (
            "import sys, pathlib; from mohawkify.errors import UsageError; from mohawkify.files.lock import run_lock\n"
            "sys.stdin.readline()\n"
            "try:\n"
            "    with run_lock(pathlib.Path(sys.argv[1])): print('won', flush=True); sys.stdin.readline()\n"
            "except UsageError: print('refused', flush=True); sys.stdin.readline()"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        pipe = subprocess.PIPE
        processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
        for process in processes:
            process.communicate("end\n")
        assert sorted(answers) == ["refused"] * 5 + ["won"]

    def test_a_forked_child_does_not_keep_it(self, tmp_path: Path) -> None:
        with run_lock(tmp_path):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        try:
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_the_holder_is_named_though_it_writes_its_number_late(self, tmp_path: Path) -> None:
        handle = os.open(tmp_path / LOCK_NAME, os.O_RDWR | os.O_CREAT)
        os.pwrite(handle, b"999999999\n", 0)  # of a process that was killed
        fcntl.flock(handle, fcntl.LOCK_EX)
        late = threading.Timer(0.2, lambda: os.pwrite(handle, b"%09d\n" % os.getppid(), 0))
        late.start()
        try:
            with pytest.raises(UsageError, match=rf"\(pid 0*{os.getppid()}\)"), run_lock(tmp_path):
                pass
        finally:
            late.join()
            os.close(handle)

    def test_a_lock_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("x")
        (tmp_path / ".lock").symlink_to("victim")
        with pytest.raises(StorageError, match="cannot lock"), run_lock(tmp_path):
            pytest.fail("the block must not begin")
        assert (tmp_path / "victim").read_text() == "x"


class TestSpace:
    def test_a_writable_folder_is_created_and_left_clean(self, tmp_path: Path) -> None:
        ensure_writable(tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []

    def test_a_path_below_a_file_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        below = tmp_path / "file" / "run"

        def in_lock() -> None:
            with run_lock(below):
                pytest.fail("the block must not begin")

        def in_atomic_directory() -> None:
            with atomic_directory(below):
                pytest.fail("the block must not begin")

        attempts = [
            lambda: ensure_writable(below),
            lambda: write_text(below, "x"),
            lambda: append_line(below, {}),
            lambda: remove_directory(below),
            in_atomic_directory,
            in_lock,
        ]
        for attempt in attempts:
            with pytest.raises(StorageError, match=r"file/run: Not a directory") as caught:
                attempt()
            assert "\n" not in caught.value.message
        assert content_of(tmp_path) == {"file": b"x"}

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs the read-only /proc of Linux")
    def test_a_folder_that_takes_no_files(self) -> None:
        with pytest.raises(StorageError, match=r"cannot write in /proc/self"):
            ensure_writable(Path("/proc/self"))

    def test_free_bytes_of_a_folder_to_come(self, tmp_path: Path) -> None:
        free = free_bytes(tmp_path / "not" / "yet")
        assert free > 0
        require_space(tmp_path / "not" / "yet", 1)
        assert list(tmp_path.iterdir()) == []

    def test_too_little_space_names_path_needed_and_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk, "free_bytes", lambda directory: 1_000)
        require_space(tmp_path, 1_000)
        with pytest.raises(StorageError) as caught:
            require_space(tmp_path, 1_001)
        assert caught.value.message == f"{tmp_path} needs 1,001 bytes, 1,000 are free"
