"""The loop of a fuzz target: replay what ever failed, draw new inputs, judge each, keep those that fail."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from mohawkify.errors import MohawkifyError
from tests.fuzz import IS_SOAK, LOG, SEED, cases

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS = 1.0  # of the processor, so that a busy machine does not fail a test
MOST_MEMORY = 256 * 2**20
STUCK_SECONDS = 300  # of the clock: an input that waits for something that never comes
MOST_FAILURES = 25  # of different kinds, before a soak of a target gives up

Draw = Callable[[Random], bytes]
Check = Callable[[bytes], None]


def run_campaign(target: str, number: int, draw: Draw, check: Check, most_seconds: float = MOST_SECONDS) -> None:
    """Judge a target's kept inputs and then new ones; an input that fails is written to the corpus.

    Args:
        target: names the folder of the corpus.
        number: new inputs on every change.
        draw: makes an input from a random generator; an input is bytes, and all that `check` needs to know.
        check: raises for an input that is not dealt with as promised.
        most_seconds: processor time that one input may take.
    """
    kept = sorted(path for path in (CORPUS / target).glob("*") if path.is_file())
    failures: dict[str, str] = {}
    done = 0
    start = time.perf_counter()

    def judge(case: bytes, name: str) -> None:
        nonlocal done
        done += 1
        try:
            _run_limited(case, check, most_seconds)
        except Exception as error:
            kind = _kind(error)
            if kind not in failures:
                failures[kind] = f"{name}: {kind}\n{''.join(traceback.format_exception(error))[-3000:]}"
                if name.startswith("case "):
                    _keep(target, case)

    for path in kept:
        judge(path.read_bytes(), path.name)
    for index in range(cases(number)):
        if failures and (not IS_SOAK or len(failures) >= MOST_FAILURES):
            break
        judge(draw(Random(f"{target} {SEED} {index}")), f"case {index} of seed {SEED}")
    record(target, done, time.perf_counter() - start, list(failures))
    assert not failures, f"{target}, seed {SEED}:\n\n" + "\n".join(failures.values())


def require_message(error: MohawkifyError, part: str = "") -> None:
    """Fail where an error says nothing, or not what it must say."""
    assert error.message, f"an empty {type(error).__name__}"
    assert part in error.message, f"{part!r} is not in: {error.message}"


def record(target: str, done: int, seconds: float, failures: list[str]) -> None:
    """Print how a target fared, and append it to the log of a soak."""
    line = {
        "target": target,
        "cases": done,
        "seconds": round(seconds, 2),
        "rate": round(done / max(seconds, 1e-9), 1),
        "seed": SEED,
        "failures": failures,
    }
    print(json.dumps(line))
    if LOG:
        with open(LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def counted(target: str) -> Iterator[list[Any]]:
    """Count the examples of a Hypothesis test: it appends to the list that is handed out."""
    seen: list[Any] = []
    start = time.perf_counter()
    failures: list[str] = []
    try:
        yield seen
    except BaseException as error:
        failures.append(_kind(error))
        raise
    finally:
        record(target, len(seen), time.perf_counter() - start, failures)


def _run_limited(case: bytes, check: Check, most_seconds: float) -> None:
    memory = _peak_memory()
    previous = signal.signal(signal.SIGALRM, _stuck)
    signal.setitimer(signal.ITIMER_REAL, STUCK_SECONDS)
    gc.disable()  # going through all that a long campaign has left is not the input's time
    started = time.process_time()
    try:
        check(case)
    finally:
        seconds = time.process_time() - started
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seconds <= most_seconds, f"one input took {seconds:.1f} s of processor time"
    grown = _peak_memory() - memory
    assert grown <= MOST_MEMORY, f"one input took {grown // 2**20} MB of memory"


def _stuck(number: int, frame: Any) -> None:
    raise TimeoutError(f"one input took over {STUCK_SECONDS} s")


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kind(error: BaseException) -> str:
    """Tell failures apart by their type and the place that raised them."""
    if isinstance(error, AssertionError):
        first = (str(error).splitlines() or [""])[0][:100]
        return f"AssertionError: {re.sub(r'[0-9]+', 'N', first)}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/mohawkify/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


def _keep(target: str, case: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(case).hexdigest()[:12]).write_bytes(case)
