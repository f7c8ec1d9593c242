"""Folders that the datasets library wrote: its own results are no text, and splits do not run together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from mohawkify.data.sources import raw_documents, source_identity
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.conftest import SHARED_DATA

ROWS = [f"row {number}" for number in range(6)]


def read(path: Path, **settings: Any) -> list[str]:
    source = Source.model_validate({"path": str(path), **settings})
    assert source_identity(source, None)["files"]
    return [row.value for row in raw_documents(source, None)]


def rows_of(name: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"{name} {row}" for row in ROWS]})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset in two files, and what the library leaves beside them when it is shuffled and mapped."""
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved", num_shards=2)
    dataset = datasets.load_from_disk(tmp_path / "saved")
    dataset.shuffle(seed=0)
    dataset.map(lambda row: {"text": row["text"].upper()})
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 2
    return tmp_path / "saved"


def test_results_of_the_library_are_no_text(saved: Path) -> None:
    assert read(saved) == read(saved / "*.arrow") == read(saved.parent) == ROWS
    assert sorted(read(next(saved.glob("data-00001*")))) == ROWS[3:]  # a file that is named is read


def test_a_file_that_is_missing(saved: Path) -> None:
    next(saved.glob("data-00001*")).unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00001-of-00002\.arrow, which is not there"):
        read(saved)


def test_one_split_of_several_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "dict"
    datasets.DatasetDict({name: rows_of(name) for name in ("train", "test")}).save_to_disk(folder)
    wanted = {name: rows_of(name)["text"] for name in ("train", "test")}
    assert read(folder) == read(tmp_path) == read(folder / "*" / "*.arrow") == list(wanted["train"])
    assert read(folder, split="test") == read(folder / "test") == read(folder / "test" / "*") == list(wanted["test"])
    for path in (folder, tmp_path):
        with pytest.raises(DataError, match=r"dict has no split 'dev'; it has: train, test"):
            read(path, split="dev")


def test_the_library_s_cache_of_a_dataset(tmp_path: Path) -> None:
    files = {}
    for name in ("train", "test"):
        files[name] = str(tmp_path / f"{name}.jsonl")
        rows_of(name).to_json(files[name])
    cached = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    cached["train"].map(lambda row: {"text": row["text"].upper()})
    folder = Path(cached["train"].cache_files[0]["filename"]).parent
    assert len(list(folder.glob("*.arrow"))) == 3
    assert read(folder) == list(rows_of("train")["text"])
    assert read(folder, split="test") == list(rows_of("test")["text"])


def test_a_split_of_what_has_none_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path in (saved, tmp_path / "a.txt", tmp_path / "*.txt"):
        with pytest.raises(DataError, match="holds no splits, but the split 'test' is asked for"):
            read(path, split="test")


def test_files_of_other_programs_are_nobody_s_list(tmp_path: Path) -> None:
    for content in ("[]", "{}", '{"_data_files": 7, "splits": "train"}'):
        folder = tmp_path / str(len(content))
        rows_of("a").save_to_disk(folder)
        (folder / "dataset_info.json").write_text(content)
        if content != '{"_data_files": 7, "splits": "train"}':
            (folder / "state.json").write_text(content)
        assert read(folder) == list(rows_of("a")["text"])


@pytest.mark.parametrize("name", ["mapped", "shuffled"])
def test_folders_that_once_failed(name: str) -> None:
    folder = SHARED_DATA / "faults" / "arrow" / name
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/faults")
    texts = read(folder)
    assert len(texts) == len(set(texts)) == 60
