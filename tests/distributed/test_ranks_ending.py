"""Conversions in two processes when one of them fails: one line, one exit code, and the run goes on."""

from __future__ import annotations

import pytest

from mohawkify.run import checkpoint
from tests.distributed.rank_runs import (
    Workshop,
    ended,
    ranks,
    require_finished,
    require_one_line,
    when_logged,
)

# What a process with the number 1 runs first: its text becomes unreadable at its fifth batch.
BREAK_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import itertools
    from mohawkify.data import packing
    from mohawkify.errors import DataError
    calls, packed_batch = itertools.count(1), packing.packed_batch
    def broken(*arguments):
        if next(calls) == 5:
            raise DataError("the disk of this machine has lost the text")
        return packed_batch(*arguments)
    packing.packed_batch = broken
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ranks-ending"))


@pytest.mark.full
def test_a_run_survives_an_error_in_one_process_and_a_kill(workshop):
    """An error in one process under ZeRO-1, a kill under ZeRO-3, and the end still is the curve of one process."""
    folder = workshop.folder / "chain"
    (workshop.folder / "site").mkdir()
    (workshop.folder / "site" / "sitecustomize.py").write_text(BREAK_RANK_1)
    options = ("--processes", "2", "--engine", "deepspeed", "--zero", "1", "--set", "compute.data_workers=0")
    code, output, errors = ended(workshop.start("chain", *options, PYTHONPATH=str(workshop.folder / "site")))
    assert code == 66, errors
    assert output == ""
    require_one_line(errors, "the disk of this machine has lost the text")
    assert checkpoint.newest_valid(folder / "checkpoints", pytest.fail).global_step == 4

    process = workshop.start("chain", "--processes", "2", "--zero", "3")
    when_logged(process, folder, 6, lambda: ranks(process)[1].kill())
    code, _, errors = ended(process)
    assert code == 75, errors
    require_one_line(errors, "process")
    assert checkpoint.newest_valid(folder / "checkpoints", pytest.fail).global_step >= 5
    require_finished(workshop, "chain", workshop.start("chain", "--processes", "2", "--zero", "3"))
