"""Progress on a terminal and elsewhere, whatever the clock does."""

from __future__ import annotations

import io
import re
import time

import pytest

from mohawkify.train import progress
from mohawkify.train.loop import StepReport
from mohawkify.train.progress import StageProgress

YEAR = 365 * 86_400


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("leap", [-YEAR, YEAR])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_clock_that_is_set_spoils_no_estimate(monkeypatch, is_terminal, leap):
    shown = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    clock, leaps = time.time, 0
    for name in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(name, lambda: clock() + leaps * leap)
    with StageProgress("orient", 4_000, 0) as bar:
        for step in range(4):
            leaps = step
            time.sleep(0.15)  # more than a bar waits before it is drawn anew
            bar.update(StepReport(step + 1, 1_000, 1e-3, 1.0, 0.15, {"loss": 2.0}))
    text = shown.getvalue()
    assert "nan" not in text
    assert "inf" not in text
    if is_terminal:
        assert "100%" in text
        assert re.findall(r"\[\d\d:\d\d<", text), text
        assert not re.findall(r"\d+:\d\d:\d\d", text), "hours, or a time before the beginning"
    else:
        assert len(re.findall(r"  \d+ s left", text)) == 4, text
