"""Processes that start at once: a server imports everything and forks; each child is a `mohawkify` of its own.

The server knows two requests, each a line of JSON: start a child, and wait for one. A child is not reaped before it is
waited for, so its number stays its own and may be sent signals at any time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

PRELOADED = (
    *("torch", "transformers.conversion_mapping", "transformers.models.llama.modeling_llama"),
    *(
        "mohawkify.train.trainer",
        "mohawkify.evaluation.evaluation",
        "mohawkify.exporters.export",
        "mohawkify.cli.quiet",
    ),
    *("mohawkify.train.engines.fsdp_engine", "tests.soak.inside"),
)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Args:
        code: its exit code; minus the signal where a signal killed it.
        output: standard output and standard error together.
    """

    code: int
    output: str


class Child:
    """A process that the server has forked.

    Args:
        server: that server.
        pid: the process's number.
        log: where its output goes.
    """

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log
        self._ended: Ended | None = None

    def send(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended already."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120.0) -> Ended:
        """Wait for its end; a child that does not end in time is killed."""
        if self._ended is None:
            code = os.waitstatus_to_exitcode(self._server.ask(wait=self.pid, seconds=seconds)["status"])
            self._ended = Ended(code, self._log.read_text(encoding="utf-8", errors="replace"))
        return self._ended


class Server:
    """Starts children; close it to end it.

    Args:
        logs: a folder for their output.
    """

    def __init__(self, logs: Path) -> None:
        self._logs, self._count = logs, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        self.ask()  # answers once everything is imported

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of processes has ended; its standard error says why"
        return json.loads(answer)

    def start(
        self,
        folder: Path,
        *arguments: Any,
        fault: str | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Child:
        """Start a command line in a folder.

        Args:
            folder: the child's working directory.
            arguments: what stands after `mohawkify`.
            fault: what goes wrong inside, one of the functions of `tests.soak.inside`.
            environment: variables of its own.
            options: the fault's arguments.
        """
        self._count += 1
        log = self._logs / f"{self._count:05d}.txt"
        log.touch()  # a child may be killed before it opens it
        answer = self.ask(
            folder=str(folder), arguments=[str(a) for a in arguments], log=str(log), fault=fault,
            environment=environment or {}, options=options,
        )  # fmt: skip
        return Child(self, answer["pid"], log)

    def run(self, folder: Path, *arguments: Any, fault: str | None = None, **options: Any) -> Ended:
        """Start a command line and wait for its end."""
        return self.start(folder, *arguments, fault=fault, **options).wait()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Answer requests until standard input ends."""
    modules = {name: importlib.import_module(name) for name in PRELOADED}
    modules["torch"].set_num_threads(1)
    modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # 900 patterns, compiled once
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": _wait(request["wait"], request["seconds"])}
        elif "log" in request:
            answer = {"pid": _fork(request)}
        else:
            answer = {"ready": True}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(pid: int, seconds: float) -> int:
    """Wait for a child, and kill it where that takes too long; returns its status."""
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = os.waitpid(pid, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return status


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(handle, place)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        os.closerange(3, 100)  # the pipes of the server, which would otherwise stay open with its children
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        from tests.soak import inside

        code = inside.run(request["arguments"], request["fault"], request["options"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(path: Path, seconds: float = 120.0) -> None:
    """Wait until a child has made a file that says how far it is."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come within {seconds} s"
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
