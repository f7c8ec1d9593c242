"""An error in one process of a run ends all of them: the first error is printed, and all exit with its code.

A process blocked in a collective cannot receive an error through it. So errors travel outside of collectives: through
the key-value store of torch's rendezvous, which a thread of every process polls.
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

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0  # for a process to exit by itself, once another one has failed
_PRINT_SECONDS = 5.0  # for the first failed process to print its error
_ACKNOWLEDGE_SECONDS = 2.0  # for the others to read it
_AGREE_SECONDS = 10.0  # in all; a store whose process is stopped never answers
_LOST = re.compile(r"gloo/transport|Connection (closed|reset)|Broken pipe|NCCL|Socket", re.IGNORECASE)


class OtherProcessError(MohawkifyError):
    """Another process has failed and prints why; this one exits silently."""


class FailureReporter:
    """Shares the first error of a run among its processes.

    Args:
        store: a connection of its own to the rendezvous store.
    """

    def __init__(self, store: distributed.Store, rank: int, size: int = 1) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._peer_codes: list[int] = []  # the exit code of the first error, if it came from another process
        self._lock = threading.Lock()
        self._parent = os.getppid()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self._thread.start()

    def report(self, code: int, print_error: Callable[[], None], kind: str = "error") -> int:
        """Agree on the error that ends the run, the first one; its process prints it.

        Args:
            code: the exit code of this process's error.
            kind: ``hang`` makes the other processes print their stacks.

        Returns:
            The exit code of all processes.
        """
        codes: list[int] = []
        agreement = threading.Thread(target=self._agree, args=(code, print_error, kind, codes), daemon=True)
        agreement.start()
        agreement.join(_AGREE_SECONDS)
        if codes:
            return codes[0]
        if self._peer_codes:
            return self._peer_codes[0]
        # The store has ended or stopped with the process that holds it, in most cases rank 0.
        if self._rank == 0 or (self._rank == 1 and code == HANG):
            print_error()
        return code

    def _agree(self, code: int, print_error: Callable[[], None], kind: str, codes: list[int]) -> None:
        """The part of `report` that uses the store, which may never answer; appends the exit code of all processes."""
        own = f"{code} {self._rank} {kind}"
        with suppress(RuntimeError):
            first = self._store.compare_set("error", "", own).decode()
            codes.append(int(first.split()[0]))
            if first == own:
                print_error()
                self._store.set("printed", "")
            else:
                self._acknowledge(first.split())
                self._wait_for_print()
            if first == own or self._rank == 0:
                self._wait_for_acknowledgements()

    def _acknowledge(self, error: list[str]) -> None:
        """Record an error of another process, once, and count this process as informed; print the stacks for a hang."""
        code, rank, kind = error
        with self._lock:
            if self._peer_codes or int(rank) == self._rank:
                return
            self._peer_codes.append(int(code))
        if kind == "hang":
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._store.add("informed", 1)

    def _wait_for_acknowledgements(self) -> None:
        """Delay the exit of the failed process, and of rank 0, which may hold the store, until all are informed."""
        deadline = time.monotonic() + _ACKNOWLEDGE_SECONDS
        while self._store.add("informed", 0) < self._size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def raise_if_peer_failed(self) -> None:
        """Raise OtherProcessError if another process has failed, ProcessLostError if the store does not answer."""
        try:
            has_failed = self._store.check(["error"])
            if has_failed:
                self._acknowledge(self._store.get("error").decode().split())
        except RuntimeError as error:
            raise lost(error) from error
        if has_failed:
            raise OtherProcessError("another process of the run has failed")

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()
        self._thread.join()

    def _wait_for_print(self) -> None:
        """Delay this exit: some launchers kill all processes when one exits, also the one that is printing."""
        deadline = time.monotonic() + _PRINT_SECONDS
        while not self._store.check(["printed"]) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _watch(self) -> None:
        has_store = True
        while not self._closed.wait(POLL_SECONDS):
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)  # the launcher has died: save and exit
            try:
                if has_store and self._store.check(["error"]):
                    error = self._store.get("error").decode().split()
                    self._acknowledge(error)
                    self._exit_after_grace(int(error[0]))
            except RuntimeError:
                has_store = False  # the main thread gets the same error

    def _exit_after_grace(self, code: int) -> None:
        """Exit if the main thread does not: it may be blocked in a collective that never completes."""
        if not self._closed.wait(GRACE_SECONDS):
            os._exit(code)


def lost(error: BaseException) -> ProcessLostError:
    """The error of a process whose peer has died without reporting one."""
    found = ProcessLostError(
        "another process of the run has ended without an error",
        hint="was it killed, by the system for its memory perhaps? The newest checkpoint is intact and the same command"
        " continues",
    )
    found.__cause__ = error
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an error means that a connection to another process is lost."""
    if isinstance(error, MohawkifyError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or _LOST.search(str(error)) is not None
