"""The command chat, in a terminal and without one: nothing that a model writes steers the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mohawkify.cli.main import main
from mohawkify.errors import harmless
from tests.finished import finished_run, scripted_run

HOSTILE = "Hi \x1b]0;me\x07\x9b2J\r"
SHOWN = "Hi \\x1b]0;me\\x07"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose students answer with what would steer a terminal, once and without end."""
    folder = tmp_path_factory.mktemp("runs")
    scripted_run(folder / "once", "Hi \x1b]0;me\x07")
    scripted_run(folder / "endless", "\x1b[31m\n")
    return folder


def talk(run: Path, lines: str, *options: str) -> Result:
    """A chat whose messages come from a file."""
    return CliRunner().invoke(main, ["chat", str(run), *options], input=lines)


def test_control_characters_become_visible_and_text_stays():
    assert harmless(HOSTILE) == SHOWN + "\\x9b2J\\r"
    text = "Zeile\n\tمی‌خواهم 👩‍🚀 ½ 中"
    assert harmless(text) == text
    assert harmless("a\u202eb\u2066c\ud800") == "a\\u202eb\\u2066c\\ud800"


def test_lines_of_standard_input_are_messages_and_commands(runs, tmp_path):
    lines = f"hello\n\n//etc is a folder\n/save {tmp_path}/state\n/reset\n/save {tmp_path}/other\n"
    done = talk(runs / "once", f"{lines}/nothing\n/save\n/quit\nmore\n")
    assert done.exit_code == 0
    assert done.stdout == f"{SHOWN}\n" * 2
    assert [line for line in done.stderr.splitlines() if line.startswith(("saved", "forgotten", "error"))] == [
        f"saved to {tmp_path}/state",
        "forgotten",
        "error: the conversation is empty, expected a message before it is saved",
        "error: found /nothing, expected /reset, /save FILE, /help or /quit",
        "error: found no name, expected /save FILE",
    ]
    assert not (tmp_path / "other").exists()
    assert talk(runs / "once", "and?\n", "--load-state", f"{tmp_path}/state").stdout == f"{SHOWN}\n"
    refused = talk(runs / "endless", "and?\n", "--load-state", f"{tmp_path}/state")
    assert (refused.exit_code, refused.stdout) == (66, "")
    assert "was saved with another model" in refused.stderr


def test_a_student_without_a_template_is_refused_in_one_line(tmp_path):
    finished_run(tmp_path / "run", template=None)
    refused = talk(tmp_path / "run", "hello\n")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-2].startswith("error: the student's tokenizer has no chat template")


class Terminal:
    """A process with a terminal of its own, typed into and read."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "mohawkify", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen, self._place = b"", 0

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Read until the text comes behind what was waited for last."""
        end = time.monotonic() + seconds
        while (place := self.seen.find(text.encode(), self._place)) < 0:
            assert time.monotonic() < end, self.seen
            if select.select([self._master], [], [], 0.2)[0]:
                self.seen += os.read(self._master, 65536)
        self._place = place + len(text)


def test_a_chat_in_a_terminal(runs, tmp_path):
    terminal = Terminal("chat", str(runs / "endless"), "--max-tokens", "1000000")
    try:
        terminal.wait_for("> ")
        terminal.type("hello\r")
        terminal.wait_for("\\x1b[31m\r\n\\x1b[31m")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type(f"/save {tmp_path}/state\r")
        terminal.wait_for("saved to")
        terminal.wait_for("> ")
        terminal.type("again\r")
        terminal.wait_for("\\x1b[31m")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("/reset\r")
        terminal.wait_for("forgotten")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert b"\x1b[31m" not in terminal.seen
    assert (
        re.findall(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", terminal.seen.replace(b"\x1b[?2004", b"").replace(b"\x07", b""))
        == []
    )
    assert (tmp_path / "state").is_file()


def test_a_terminal_is_not_steered_by_generate_either_and_a_file_gets_every_byte(runs, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    arguments = ["generate", str(runs / "once"), "Say\n"]
    assert CliRunner().invoke(main, arguments).stdout == "Say\nHi \x1b]0;me\x07\n"
    screen = Screen()
    monkeypatch.setattr("mohawkify.cli.main.quiet_libraries", lambda: contextlib.nullcontext(screen))
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert screen.getvalue() == f"Say\n{SHOWN}\n"
