"""How far tokenising is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1


class TokenizeProgress:
    """Shows tokens so far and tokens per second, once it takes longer than a few seconds.

    Args:
        name: what is tokenised.
        num_tokens: how many are wanted.
        report: receives the lines.
    """

    def __init__(self, name: str, num_tokens: int, report: Callable[[str], None]) -> None:
        self.name, self.num_tokens, self.report = name, num_tokens, report
        self._begin = self._shown = self._looked = time.monotonic()
        self._first: int | None = None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_tokens, desc=name, unit="tok", unit_scale=True, delay=1.0, leave=False)

    def __enter__(self) -> TokenizeProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def see(self, num_tokens: int) -> None:
        """Take note of the tokens so far."""
        now = time.monotonic()
        if self._first is None:
            self._first = num_tokens  # earlier calls made these
            self._begin = self._shown = now
        if now - self._looked < _SECONDS_BETWEEN_LOOKS and num_tokens < self.num_tokens:
            return
        self._looked = now
        if self._bar is not None:
            self._bar.update(num_tokens - self._bar.n)
        elif now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            rate = (num_tokens - self._first) / (now - self._begin)
            self.report(
                f"{self.name}: {num_tokens:,} of {self.num_tokens:,} tokens ({num_tokens / self.num_tokens:.0%}),"
                f" {rate:,.0f} tokens/s"
            )
