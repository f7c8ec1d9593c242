"""Keeps a model's responses on the disk, so that a stopped evaluation continues without repeating them.

A request is identified by a hash of its kind and content: the questions themselves are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mohawkify.files import atomic


class ResponseCache:
    """The responses of one model, a line of JSON for each.

    Args:
        path: where they are kept; what is there already is taken over.

    Raises:
        StorageError: the file cannot be read.
        CheckpointError: it does not hold what was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = atomic.read_lines(path)
        self._known = {line["request"]: line for line in lines if isinstance(line.get("request"), str)}
        self._cut: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, kind: str, request: Sequence[Any]) -> Any | None:
        """An answer as lm-eval's models give it; None where the request is still open.

        Args:
            kind: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
            request: its arguments.
        """
        answer = self._known.get(request_sha256(kind, request), {}).get("answer")
        # A value that is not finite is stored as a word, and its request is repeated.
        if kind == "loglikelihood":
            if isinstance(answer, list) and [type(part) for part in answer] == [float, bool]:
                return tuple(answer)
            return None
        return answer if isinstance(answer, str if kind == "generate_until" else float) else None

    def was_cut(self, kind: str, request: Sequence[Any]) -> bool:
        """Whether the context of an answered request did not fit the window whole."""
        return self._known.get(request_sha256(kind, request), {}).get("cut") is True

    def will_be_cut(self, kind: str, request: Sequence[Any]) -> None:
        """Note that the context of a request does not fit the window whole, before it is answered."""
        self._cut.add(request_sha256(kind, request))

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Keep an answer; lm-eval's models call this by its name whenever they have one."""
        key = request_sha256(kind, request)
        atomic.append_line(self._path, {"request": key, "answer": answer, "cut": key in self._cut})


def request_sha256(kind: str, request: Sequence[Any]) -> str:
    """The hash of a request: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps([kind, *request], sort_keys=True, default=str).encode()).hexdigest()
