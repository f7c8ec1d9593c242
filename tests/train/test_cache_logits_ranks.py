"""A teacher asked by two processes: the shards of one, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mohawkify.data import teacher_logits
from tests.commands import make_teacher, run_well
from tests.data.test_teacher_logits import RECIPE, contents

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL_SHARDS = """
from mohawkify.data import teacher_logits
teacher_logits.SHARD_BYTES = 2000
from mohawkify.cli.main import main
main()
"""


@pytest.mark.full
def test_two_processes_write_the_shards_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher(tmp_path / "teacher")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "small_shards.py").write_text(SMALL_SHARDS)
    arguments = [
        *("cache-logits", str(tmp_path / "teacher"), "--recipe", str(tmp_path / "r.yaml")),
        *("--top-k", "9", "--output"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, *TORCHRUN, str(tmp_path / "small_shards.py"), *arguments, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'two'}\n"
    monkeypatch.setattr(teacher_logits, "SHARD_BYTES", 2000)
    run_well(*arguments, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "two").glob("shard-*"))) > 4
