"""Progress of a stage: a bar on a terminal, a line now and then elsewhere; always on standard error."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from mohawkify.train.loop import StepReport

SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """Shows tokens done and left, tokens/s, loss, learning rate, memory and time to the end.

    Args:
        name: the stage's name.
        num_tokens: tokens of the whole stage.
        done_tokens: tokens of it done before this process.
        is_shown: whether this is the process that shows it.
    """

    def __init__(self, name: str, num_tokens: int, done_tokens: int, is_shown: bool = True) -> None:
        self.name, self.num_tokens, self.tokens = name, num_tokens, done_tokens
        self._own_tokens = 0
        self._begin = self._shown = time.monotonic()
        self._bar: _SteadyBar | None = None
        self._is_shown = is_shown
        if is_shown and sys.stderr.isatty():
            self._bar = _SteadyBar(
                total=num_tokens, initial=done_tokens, desc=name.ljust(7), unit="tok", unit_scale=True, smoothing=0.05
            )

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, tokens: int) -> None:
        """Lower the stage's total by so many tokens."""
        self.num_tokens -= tokens
        if self._bar is not None:
            self._bar.total = self.num_tokens

    def update(self, report: StepReport) -> None:
        """Show one more step."""
        if not self._is_shown:
            return
        self.tokens += report.tokens
        self._own_tokens += report.tokens
        metrics = {name: f"{value:.4g}" for name, value in report.metrics.items()}
        metrics |= {"lr": f"{report.learning_rate:.2g}", "mem": f"{memory_gigabytes():.1f}G"}
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(metrics, refresh=False)
            self._bar.update(report.tokens)
        elif now - self._shown >= SECONDS_BETWEEN_LINES or self.tokens >= self.num_tokens:
            self._shown = now
            rate = self._own_tokens / (now - self._begin)
            left = (self.num_tokens - self.tokens) / rate
            shown = "  ".join(f"{name} {value}" for name, value in metrics.items())
            print(
                f"{self.name:<7} {self.tokens / self.num_tokens:4.0%}  {self.tokens:,} of {self.num_tokens:,} tokens  "
                f"{rate:,.0f} tok/s  {left:.0f} s left  {shown}",
                file=sys.stderr,
                flush=True,
            )


class _SteadyBar(tqdm):
    """A bar by a monotonic clock; tqdm's own is by the time of day, which may be set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()


def memory_gigabytes() -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1.0 if sys.platform == "darwin" else 1024.0) / 1e9
