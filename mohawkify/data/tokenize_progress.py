"""The progress of tokenising: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.1


@contextmanager
def tokenize_progress(name: str, num_tokens: int, report: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of tokens so far, and shows it once that takes a few seconds.

    Args:
        name: what is tokenised.
        num_tokens: how many tokens are needed.
        report: receives the lines.
    """
    begin = shown = updated = time.monotonic()
    first: int | None = None
    with tqdm(
        total=num_tokens,
        desc=name,
        unit="tok",
        unit_scale=True,
        delay=1.0,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:

        def update(done: int) -> None:
            nonlocal begin, shown, updated, first
            now = time.monotonic()
            if first is None:  # an earlier call made these
                first, begin, shown = done, now, now
            if now - updated < _SECONDS_BETWEEN_UPDATES and done < num_tokens:
                return
            updated = now
            bar.update(done - bar.n)
            if bar.disable and now - shown >= _SECONDS_BETWEEN_LINES:
                shown = now
                rate = (done - first) / (now - begin)
                report(f"{name}: {done:,} of {num_tokens:,} tokens ({done / num_tokens:.0%}), {rate:,.0f} tokens/s")

        yield update
