"""Task files over questions of our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WriteTask = Callable[..., Path]
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACCURACY_PER_LENGTH = {**ACCURACY, "metric": "acc_norm"}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{label}}",
    "metric_list": [ACCURACY, ACCURACY_PER_LENGTH],
}


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes a task file over a JSON-lines file, which is copied beside it."""

    def write(name: str, data: Path, settings: dict[str, Any], **changes: Any) -> Path:
        if not data.exists():
            pytest.skip(f"needs {data}, which is not here")
        if data.parent != tmp_path:
            shutil.copyfile(data, tmp_path / data.name)
        kwargs = {"data_files": {"test": data.name}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **settings}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**task, "metadata": {"version": 3.0}, **changes}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two questions of our own."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {"query": "Lily saw a", "endings": ["ball.", "quadratic form."], "label": 0, "text": "Tim was sad"},
        {"query": "The dog ran to the", "endings": ["senate.", "park."], "label": 1, "text": "She was happy"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path
