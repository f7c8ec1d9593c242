"""Renders the logs of `make soak` as a table in docs/reliability.md, between two marks.

Run as ``python -m tests.soak.report SOAK_LOG [FUZZ_LOG] --machine "8-core laptop"``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from mohawkify.files.atomic import write_text
from tools.recipe_docs import replace_between

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN = "<!-- From here to the end mark the page is written from logs; `python -m tests.soak.report` renews it. -->"
END = "<!-- End of what is written from the logs. -->"
PROMISES = {
    "P1": "SIGKILL at any instant costs nothing but time: the same call ends with the same bits",
    "P2": "The same at every operation on the disk",
    "P3": "Resuming a resumed run, six times over",
    "P4": "After a power cut a checkpoint is valid with the right bytes, or it is rejected",
    "P5": "Every damage is noticed before use; a run falls back and says so",
    "P6": "A full disk is one line and exit code 74; nothing is lost; the run goes on with space",
    "P7": "Never more than `keep` + 1 checkpoints on the disk",
    "P9": "SIGTERM and Ctrl-C end a run with all it has done",
    "P10": "One process works in a folder; the lock of a killed one is free",
    "P12": "A run goes on in another number of processes, on the curve of one",
    "P14": "A number that is not finite reaches neither weights nor checkpoints",
    "P15": "Training that does not train ends by name",
    "P16": "A leap of the loss is judged alike after a resume",
    "P20": "Another recipe, teacher or text is refused, between stages too",
    "P22": "An export is whole or absent",
    "P24": "A hang ends by name, with exit code 75",
    "P25": "Without memory: exit code 71 and an intact checkpoint",
}


def table(soak: list[dict[str, Any]], fuzz: list[dict[str, Any]], machine: str, command: str, date: str) -> str:
    """The Markdown between the marks.

    Args:
        soak: the lines of a soak's log: promise, tried, held, seconds, what.
        fuzz: the lines of a fuzz log: target, cases, seconds, seed, failures.
        machine: in words.
        command: what was run.
        date: when.
    """
    seconds = sum(line["seconds"] for line in [*soak, *fuzz])
    rows = [f"`{command}` on {date}, {machine}, {seconds:,.0f} s.", "", "| promised | tried | held |", "|---|---|---|"]
    for promise, words in PROMISES.items():
        for line in (line for line in soak if line["promise"] == promise):
            rows.append(f"| {promise}: {words} | {line['tried']:,} × {_cell(line['what'])} | {line['held']:,} |")
    for line in fuzz:
        held = line["cases"] - len(line["failures"])
        words = "Input of strangers is used or refused, never a crash"
        rows.append(f"| {words} | {line['cases']:,} × {_cell(line['target'])} | {held:,} |")
    return "\n".join([*rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def read_log(path: Path | None) -> list[dict[str, Any]]:
    """The lines of a log; none where there is no log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path else []


def main() -> None:
    """Renew the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("soak_log", type=Path)
    parser.add_argument("fuzz_log", type=Path, nargs="?")
    parser.add_argument("--machine", default=f"{platform.system()} on {platform.machine()}, two cores")
    parser.add_argument("--command", default="make soak")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    given = parser.parse_args()
    text = table(read_log(given.soak_log), read_log(given.fuzz_log), given.machine, given.command, given.date)
    write_text(PAGE, replace_between(PAGE.read_text(encoding="utf-8"), BEGIN, END, text))


if __name__ == "__main__":
    main()
