"""The table of what was tried, and the page it is written to."""

from __future__ import annotations

import re
from pathlib import Path

from tests.soak import report
from tools.recipe_docs import replace_between

SOAK = [{"promise": "P1", "tried": 200, "held": 199, "seconds": 600.4, "what": "SIGKILL; kills: 512 | more"}]
FUZZ = [{"target": "recipe-bytes", "cases": 4000, "seconds": 12.0, "seed": 1, "failures": ["a"]}]


def test_the_table_says_what_was_tried_and_what_held():
    text = report.table(SOAK, FUZZ, "a laptop", "make soak", "2026-01-31")
    assert text.startswith("`make soak` on 2026-01-31, a laptop, 612 s.")
    assert "| 200 × SIGKILL; kills: 512 \\| more | 199 |" in text
    assert "| 4,000 × recipe-bytes | 3,999 |" in text


def test_every_promise_that_is_tried_has_words():
    folder = Path(__file__).parent
    tried = {name for path in folder.glob("test_*.py") for name in re.findall(r'Tally\(\s*"(P\d+)"', path.read_text())}
    assert tried == report.PROMISES.keys()


def test_the_page_has_its_marks():
    page = report.PAGE.read_text(encoding="utf-8")
    renewed = replace_between(page, report.BEGIN, report.END, report.table(SOAK, FUZZ, "here", "make soak", "now"))
    assert "| 200 × SIGKILL" in renewed
    assert replace_between(renewed, report.BEGIN, report.END, "x") == replace_between(
        page, report.BEGIN, report.END, "x"
    )
