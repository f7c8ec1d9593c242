"""Run commands in this process and write down what Python opened, imported, ran and connected to; see test_trust.py.

Start it as ``python -P tests/audited.py COMMANDS.json EVENTS.json``: the commands are lists of arguments.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
REACHES = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.bind",
    "urllib.Request",
    "ctypes.dlopen",
)
events: list[tuple[str, ...]] = []
is_listening = True


def layer_hooks(event: str, arguments: tuple[Any, ...]) -> None:
    """Note an event; called by Python before it does what the event says."""
    if not is_listening:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        flags = arguments[2] or 0
        is_writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        note("write" if is_writing else "open", os.path.abspath(os.fsdecode(arguments[0])))
    elif event == "import":
        note("import", str(arguments[0]), str(arguments[1]))
    elif event == "exec" and isinstance(arguments[0], types.CodeType):
        note("exec", arguments[0].co_filename)
    elif event == "compile":
        note("compile", str(arguments[1]))
    elif event == "pickle.find_class":
        note("pickle", str(arguments[0]), str(arguments[1]))
    elif event in STARTS or event in REACHES:
        note(event, *(repr(argument)[:300] for argument in arguments))


def note(*event: str) -> None:
    events.append(event)


def main() -> None:
    """Run the commands with the ear at the door."""
    global is_listening
    commands, target = Path(sys.argv[1]), Path(sys.argv[2])
    todo = json.loads(commands.read_text(encoding="utf-8"))
    sys.argv = ["mohawkify"]
    sys.addaudithook(layer_hooks)
    from click.testing import CliRunner

    from mohawkify.cli.main import main as mohawkify

    done = []
    for number, command in enumerate(todo):
        note("command", str(number))
        result = CliRunner().invoke(mohawkify, command, input="y\n" * 9)  # to whatever is asked
        done.append({"code": result.exit_code, "out": result.stdout, "err": result.stderr})
    is_listening = False
    target.write_text(json.dumps({"done": done, "events": events}, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
