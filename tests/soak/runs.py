"""Runs of a tiny teacher, and what must be the same at the end of two of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mohawkify.files import atomic
from mohawkify.run import checkpoint
from tests.soak import LOG
from tests.soak.server import Child, Ended, Server

KILLED = -9
OPTIONS = ("--set", "checkpoint.every_steps=1", "--set", "compute.micro_batch_sequences=2")


@dataclass
class Workshop:
    """Where conversions are made.

    Args:
        server: starts processes.
        folder: with the teacher `tiny-llama` and the recipe `tiny.yaml`; the working directory of all of them.
        whole: a run that nothing disturbed.
        seconds: what it took.
    """

    server: Server
    folder: Path
    whole: Path
    seconds: float

    def start(self, run: Path, *more: Any, fault: str | None = None, **options: Any) -> Child:
        """Start the conversion in a folder, or continue it."""
        return self.server.start(self.folder, *command(run), *more, fault=fault, **options)

    def convert(self, run: Path, *more: Any, fault: str | None = None, **options: Any) -> Ended:
        """Run the conversion in a folder to its end."""
        return self.start(run, *more, fault=fault, **options).wait()

    def finish(self, run: Path, *more: Any, whole: Path | None = None) -> None:
        """Continue a run with the same call: it must end with the bits of the run that nothing disturbed."""
        ended = self.convert(run, *more)
        assert ended.code == 0, f"the same call fails with {ended.code}:\n{ended.output}"
        compare_runs(run, whole or self.whole)

    def refused(self, run: Path, code: int | tuple[int, ...], says: str, *more: Any) -> str:
        """Fail unless continuing ends with a line that says why and leaves the checkpoints; returns its output."""
        before = require_checkpoints(run)
        ended = self.convert(run, *more)
        assert ended.code in (code if isinstance(code, tuple) else (code,)), f"{ended.code}: {ended.output}"
        require_one_line(ended)
        assert says in ended.output, ended.output
        assert require_checkpoints(run) == before
        return ended.output


@contextmanager
def kept(file: Path) -> Iterator[bytes]:
    """Hand out a file's bytes and put them back afterwards, with the time of its last change."""
    times, data = file.stat(), file.read_bytes()
    try:
        yield data
    finally:
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def command(run: Path) -> list[Any]:
    """What stands after `mohawkify`."""
    return ["convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", run, *OPTIONS]


def compare_runs(run: Path, whole: Path) -> None:
    """Fail where a finished run differs from another in weights, optimiser, random state, losses or results."""
    ours, theirs = end_state(run), end_state(whole)
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    assert not different, f"{run} ended otherwise: {different[:5]}"
    leftovers = [path.name for folder in (run, run / "checkpoints") for path in folder.glob(".tmp-*")]
    assert not leftovers, f"left over in {run}: {leftovers}"


def end_state(run: Path) -> dict[str, Any]:
    """The hashes of all files of `final/` and of the last checkpoint, the metrics of every step, the results."""
    state: dict[str, Any] = {f"final/{path.name}": _hash(path) for path in (run / "final").iterdir()}
    last = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    for path in last.glob("*.safetensors"):
        state[f"{last.name}/{path.name}"] = _hash(path)
    state |= {f"step {step}": metrics for step, metrics in figures_of(run).items()}
    results = atomic.read_json(run / "results.json")
    for name, row in results["stages"].items():
        state[f"results {name}"] = {key: value for key, value in row.items() if key != "seconds"}
    return state


def figures_of(run: Path) -> dict[int, dict[str, Any]]:
    """What the log says of every step but the time it took; a step that was taken again must say the same."""
    metrics: dict[int, dict[str, Any]] = {}
    for line in atomic.read_lines(run / "metrics.jsonl"):
        if "refused" in line:
            continue
        line.pop("seconds")
        before = metrics.setdefault(line["global_step"], line)
        assert before == line, f"taken again, a step of {run} differs: {before} and {line}"
    return metrics


def require_checkpoints(run: Path, at_least: int = 1) -> int:
    """Fail unless the newest checkpoint is valid; returns its step, 0 where there is none and none is asked for."""
    skipped: list[str] = []
    found = checkpoint.newest_valid(run / "checkpoints", skipped.append)
    assert not skipped, skipped
    step = found.global_step if found is not None else 0
    assert step >= at_least, f"{run} has no checkpoint of step {at_least} or later, but {step}"
    return step


def require_one_line(ended: Ended) -> None:
    """Fail unless a command ended with one line about what went wrong, and no traceback."""
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.output
    assert "Traceback" not in ended.output, ended.output


def copy_run(run: Path, target: Path) -> Path:
    """A copy of a run that a trial may damage."""
    shutil.copytree(run, target)
    return target


@dataclass
class Tally:
    """How often a promise was tried and held; one line of the log.

    Args:
        promise: its name.
        what: what was tried, in words.
    """

    promise: str
    what: str
    tried: int = 0
    held: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    _failures: list[str] = field(default_factory=list)
    _begin: float = 0.0

    def __enter__(self) -> Tally:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        line = {
            "promise": self.promise,
            "tried": self.tried,
            "held": self.held,
            "seconds": round(time.perf_counter() - self._begin, 1),
            "what": self.what + "".join(f"; {key}: {value}" for key, value in self.notes.items()),
        }
        print(json.dumps(line))
        if LOG:
            with open(LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if kind is None:
            assert not self._failures, f"{self.promise}, {self.what}:\n" + "\n".join(self._failures)

    def trial(self, name: str, *folders: Path) -> Trial:
        """Begin a trial; its folders are removed where it holds and named where it does not."""
        self.tried += 1
        return Trial(self, name, folders)

    def note(self, key: str, number: float) -> None:
        """Add to a figure that the log's line ends with."""
        self.notes[key] = round(self.notes.get(key, 0) + number, 2)

    def note_most(self, key: str, number: float) -> None:
        """Keep the largest of a figure that the log's line ends with."""
        self.notes[key] = round(max(self.notes.get(key, 0), number), 2)


@dataclass
class Trial:
    """One trial of a promise: an assertion that fails inside is kept, and the next trial goes on."""

    tally: Tally
    name: str
    folders: tuple[Path, ...]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self.tally.held += 1
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
            return False
        if not isinstance(error, Exception):
            return False
        kept = ", ".join(str(folder) for folder in self.folders)
        self.tally._failures.append(f"{self.name} (kept: {kept}): {type(error).__name__}: {str(error)[:1500]}")
        return True


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
