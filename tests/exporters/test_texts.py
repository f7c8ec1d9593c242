"""On which text an export is compared with its run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mohawkify.data.stage_text import TextReader
from mohawkify.exporters.texts import HELD_OUT, LENGTH, WRITTEN, comparison_texts, sample_ids
from mohawkify.files.atomic import write_json
from mohawkify.recipe.loading import dump_recipe, load_recipe
from mohawkify.run.folder import RunFolder
from tests.bytes_tokenizer import bytes_tokenizer
from tests.finished import finished_run


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, object]:
    """A finished run that says which text it was measured on, and its student."""
    student = finished_run(tmp_path)
    run = RunFolder(tmp_path)
    recipe = load_recipe("demo")
    run.recipe_file.write_text(dump_recipe(recipe))
    reader = TextReader(recipe, bytes_tokenizer(), run.corpora, tmp_path, 258)
    write_json(run.text_file, reader.record())
    return run, student


def test_it_is_the_runs_held_out_text_as_it_lies_in_the_run(run: tuple[RunFolder, object]) -> None:
    folder, student = run
    lines: list[str] = []
    name, texts = comparison_texts(folder, student, bytes_tokenizer(), lines.append)
    rows = TextReader(folder.recipe(), bytes_tokenizer(), folder.corpora, folder.path, 258).held_out()
    known = {tuple(row[:LENGTH].tolist()) for row in rows}
    assert name == HELD_OUT
    assert {tuple(text.tolist()) for text in texts} <= known
    assert len(texts) == 8
    assert min(map(len, texts)) == max(min(len(row), LENGTH) for row in rows)
    assert lines == []


def test_the_student_writes_it_where_none_is_recorded_or_it_is_gone(run: tuple[RunFolder, object]) -> None:
    folder, student = run
    recorded = folder.text()["validation"]
    (folder.corpora / recorded["key"]).rename(folder.path / "elsewhere")
    note = {"folder": str(folder.path / "nowhere"), "fingerprint": recorded["fingerprint"]}
    lines: list[str] = []
    for expected in (0, 1):
        name, texts = comparison_texts(folder, student, bytes_tokenizer(), lines.append)
        assert name == WRITTEN
        assert torch.equal(torch.stack(texts), sample_ids(student))
        assert len(lines) == expected
        write_json(folder.corpora / f"{recorded['key']}.json", note)
    assert lines[0].startswith("warning: ")
    assert lines[0].endswith(f": comparing on {WRITTEN}")


def test_a_recipe_of_another_version_does_not_stand_in_the_way(run: tuple[RunFolder, object]) -> None:
    folder, student = run
    folder.recipe_file.write_text(folder.recipe_file.read_text() + "another_key: 1\n")
    lines: list[str] = []
    assert comparison_texts(folder, student, bytes_tokenizer(), lines.append)[0] == WRITTEN
    assert "unknown key" in lines[0]
