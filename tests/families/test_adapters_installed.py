"""A family from another package: the one that docs/adapters.md shows, installed and tested as every family is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FAMILY = "persimmon"
MAIN = "from mohawkify.cli.main import main; main()"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of processes that have the page's package installed, as pip installs it."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", f"mohawkify_{FAMILY}.py"):
        block = re.search(rf"^`{re.escape(name)}`:\n\n```\w+\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
        assert block, f"docs/adapters.md shows no {name}"
        (source / name).write_text(block[1], encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_family_is_listed(environment, tmp_path):
    done = run(environment, tmp_path, "-c", MAIN, "families", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert FAMILY in listed["families"]
    assert listed["details"][FAMILY]["title"] == "Persimmon"


@pytest.mark.full
def test_the_family_passes_every_familys_tests(environment):
    done = run(
        environment,
        ROOT,
        "-m",
        "pytest",
        "tests/families/test_adapters.py",
        "-q",
        "-m",
        "",
        "-k",
        FAMILY,
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


def test_without_the_package_the_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": FAMILY, "num_hidden_layers": 2}))
    done = run({**os.environ}, tmp_path, "-c", MAIN, "inspect", str(tmp_path))
    assert done.returncode == 64
    assert "query_key_value" in done.stderr
