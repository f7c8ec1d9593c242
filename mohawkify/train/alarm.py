"""An error in one process of a run ends all of them: the first to fail says so, the others leave with its exit code.

Processes that wait for each other cannot tell each other that they never will come. So errors go another way than the
numbers do: through the small store of text that torch's processes find each other by, watched by a thread.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as distributed

from mohawkify.errors import HANG, MohawkifyError, ProcessLostError

SECONDS_BETWEEN_LOOKS = 0.5
GRACE_SECONDS = 20.0  # for a process to leave by itself, once another one has failed
_SECONDS_TO_SPEAK = 5.0
_LOST = re.compile(r"gloo/transport|Connection (closed|reset)|Broken pipe|NCCL|Socket", re.IGNORECASE)


class OtherProcessError(MohawkifyError):
    """Another process has failed and says why; this one only leaves."""


class Alarm:
    """What the processes of a run tell each other when something goes wrong.

    Args:
        store: a connection of its own to what they share.
        rank: this process.
    """

    def __init__(self, store: distributed.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._parent = os.getppid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
        self._thread.start()

    def settle(self, code: int, say: Callable[[], None], kind: str = "error") -> int:
        """Agree on whose error ends the run: the first one's, who says it.

        Args:
            code: our own exit code.
            say: writes our own error.
            kind: ``hang`` lets the others show their stacks.

        Returns:
            The exit code that all leave with.
        """
        own = f"{code} {self._rank} {kind}"
        try:
            first = self._store.compare_set("error", "", own).decode()
            if first == own:
                say()
                self._store.set("said", "")
            else:
                self._await_speech()
            return int(first.split()[0])
        except RuntimeError:  # the store is gone with the process that kept it, in most cases the main one
            if self._rank == 0 or (self._rank == 1 and code == HANG):
                say()
            return code

    def require_peace(self) -> None:
        """Raise OtherProcessError where another process has failed, ProcessLostError where it cannot be known."""
        try:
            has_failed = self._store.check(["error"])
        except RuntimeError as error:
            raise lost(error) from error
        if has_failed:
            raise OtherProcessError("another process of the run has failed")

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _await_speech(self) -> None:
        """Whoever leaves first makes some launchers kill the rest: let the first one finish its sentence."""
        deadline = time.monotonic() + _SECONDS_TO_SPEAK
        while not self._store.check(["said"]) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _watch(self) -> None:
        has_store = True
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)  # the launcher has died: save and leave
            try:
                if has_store and self._store.check(["error"]):
                    self._leave_soon(self._store.get("error").decode().split())
            except RuntimeError:
                has_store = False  # the main thread will learn it too

    def _leave_soon(self, error: list[str]) -> None:
        """End a process that waits for one that will never come, where it does not notice itself."""
        code, rank, kind = error
        if kind == "hang" and int(rank) != self._rank:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if not self._over.wait(GRACE_SECONDS):
            os._exit(int(code))


def lost(error: BaseException) -> ProcessLostError:
    """The error of a process whose partner has died without a word."""
    found = ProcessLostError(
        "another process of the run has ended without a word",
        hint="was it killed, by the system for its memory perhaps? The newest checkpoint is intact and the same command"
        " continues",
    )
    found.__cause__ = error
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a connection to another process is gone."""
    if isinstance(error, MohawkifyError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or _LOST.search(str(error)) is not None
