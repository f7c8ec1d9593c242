"""The wheel holds everything and works from anywhere, with adapters and recipes inside the one namespace."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git would ship, so that no build folder is left behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "mohawkify", "adapters", "recipes"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    subprocess.run([*command, str(source)], check=True)
    return next(target.glob("mohawkify-*.whl"))


def test_the_wheel_holds_every_module_recipe_and_the_demo_teacher(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mohawkify/{path.relative_to(ROOT / 'mohawkify')}" for path in (ROOT / "mohawkify").rglob("*.py")}
    expected |= {f"mohawkify/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")}
    expected |= {f"mohawkify/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.*") if path.is_file()}
    expected |= {f"mohawkify/demo/teacher/{path.name}" for path in (ROOT / "mohawkify/demo/teacher").iterdir()}
    assert expected <= names, sorted(expected - names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mohawkify"}


def test_the_installed_command_runs_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    code = (
        "import mohawkify, sys; from mohawkify.cli.main import main; print(mohawkify.__file__, file=sys.stderr); main()"
    )
    for arguments, wanted in ((["recipes", "ls"], "llamba-1b"), (["families"], "qwen3"), (["--version"], "mohawkify")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert str(target) in done.stderr
        assert wanted in done.stdout
