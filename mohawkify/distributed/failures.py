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
from contextlib import suppress

import torch.distributed as distributed

from mohawkify.errors import HANG, MohawkifyError, ProcessLostError

SECONDS_BETWEEN_LOOKS = 0.5
GRACE_SECONDS = 20.0  # for a process to leave by itself, once another one has failed
_SECONDS_TO_SPEAK = 5.0
_SECONDS_TO_HEAR = 2.0
_SECONDS_TO_AGREE = 10.0  # of them those to speak; a store whose process is stopped gives no answer at all
_LOST = re.compile(r"gloo/transport|Connection (closed|reset)|Broken pipe|NCCL|Socket", re.IGNORECASE)


class OtherProcessError(MohawkifyError):
    """Another process has failed and says why; this one only leaves."""


class FailureReporter:
    """What the processes of a run tell each other when something goes wrong.

    Args:
        store: a connection of its own to what they share.
        rank: this process.
        size: how many there are.
    """

    def __init__(self, store: distributed.Store, rank: int, size: int = 1) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._heard: list[int] = []  # the exit code of an error in another process
        self._hearing = threading.Lock()
        self._parent = os.getppid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
        self._thread.start()

    def report(self, code: int, say: Callable[[], None], kind: str = "error") -> int:
        """Agree on whose error ends the run: the first one's, who says it.

        Args:
            code: our own exit code.
            say: writes our own error.
            kind: ``hang`` lets the others show their stacks.

        Returns:
            The exit code that all leave with.
        """
        codes: list[int] = []
        asking = threading.Thread(target=self._agree, args=(code, say, kind, codes), daemon=True)
        asking.start()
        asking.join(_SECONDS_TO_AGREE)
        if codes:
            return codes[0]
        if self._heard:
            return self._heard[0]
        # The store is gone with the process that kept it, or stopped with it: in most cases the main one.
        if self._rank == 0 or (self._rank == 1 and code == HANG):
            say()
        return code

    def _agree(self, code: int, say: Callable[[], None], kind: str, codes: list[int]) -> None:
        """What `report` does, but for the end where the store does not answer; adds the code that all leave with."""
        own = f"{code} {self._rank} {kind}"
        with suppress(RuntimeError):
            first = self._store.compare_set("error", "", own).decode()
            codes.append(int(first.split()[0]))
            if first == own:
                say()
                self._store.set("said", "")
            else:
                self._hear(first.split())
                self._await_speech()
            if first == own or self._rank == 0:
                self._await_hearers()

    def _hear(self, error: list[str]) -> None:
        """Take note of an error in another process, once: show our stacks where it hangs, and tell that it is known."""
        code, rank, kind = error
        with self._hearing:
            if self._heard or int(rank) == self._rank:
                return
            self._heard.append(int(code))
        if kind == "hang":
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._store.add("hearers", 1)

    def _await_hearers(self) -> None:
        """Let the others hear of an error before its process leaves, or the main one, with which a store may go."""
        deadline = time.monotonic() + _SECONDS_TO_HEAR
        while self._store.add("hearers", 0) < self._size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def raise_if_peer_failed(self) -> None:
        """Raise OtherProcessError where another process has failed, ProcessLostError where it cannot be known."""
        try:
            has_failed = self._store.check(["error"])
            if has_failed:
                self._hear(self._store.get("error").decode().split())
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
                    error = self._store.get("error").decode().split()
                    self._hear(error)
                    self._leave_soon(int(error[0]))
            except RuntimeError:
                has_store = False  # the main thread will learn it too

    def _leave_soon(self, code: int) -> None:
        """End a process that waits for one that will never come, where it does not notice itself."""
        if not self._over.wait(GRACE_SECONDS):
            os._exit(code)


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
