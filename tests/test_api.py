"""The Python API: the example of docs/api.md runs, the package stays light, and mistakes are errors of mohawkify."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mohawkify
from mohawkify import api
from mohawkify.errors import RecipeError, UsageError
from tests.conftest import ROOT


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "KL after distill:" in printed
    assert "stages.distil" in printed
    assert (tmp_path / "my-run" / "eval.json").is_file()
    assert (tmp_path / "my-student" / "model.safetensors").is_file()


def test_functions_of_the_package_are_those_of_the_api_also_after_submodules_are_imported() -> None:
    import mohawkify.evaluation.report
    import mohawkify.exporters.card
    import mohawkify.planning.gpus

    for name in (
        "inspect",
        "plan",
        "convert",
        "evaluate",
        "export",
        "generate",
        "chat",
        "PlanOptions",
        "GenerateOptions",
    ):
        assert getattr(mohawkify, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        mohawkify.plans  # noqa: B018


def test_the_package_alone_loads_nothing_heavy() -> None:
    code = "import mohawkify, mohawkify.api, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mistakes_are_errors_of_mohawkify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="distil"):
        mohawkify.plan("demo", "demo", ["stages.distil.tokens=1M"])
    with pytest.raises(UsageError, match="no finished run"):
        mohawkify.evaluate()
    with pytest.raises(UsageError, match="no such run"):
        mohawkify.export("nowhere", "hf")
