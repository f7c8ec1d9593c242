"""Tokenised text whose manifest fits its files and still is no corpus, as whoever edits a folder can make it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mohawkify.data.corpus import COMPLETION_FILE, OFFSETS_FILE, TOKENS_FILE, checked_facts, load_corpus, read_note
from mohawkify.data.prepare_text import inspect_text
from mohawkify.data.write_corpus import build_corpus
from mohawkify.errors import CheckpointError, DataError
from mohawkify.files import atomic
from tests.data.test_write_corpus import sources, want
from tests.fuzz.folders import inside

SHARD = "shard-00000"


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    wanted = want(sources(tmp_path, "chat"))
    build_corpus(wanted, tmp_path / "corpora")
    (tmp_path / "outside").mkdir()
    for name in (TOKENS_FILE, OFFSETS_FILE, COMPLETION_FILE):
        (tmp_path / "outside" / name).write_bytes((tmp_path / "corpora" / wanted.key / SHARD / name).read_bytes())
    return tmp_path / "corpora" / wanted.key


def reseal(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / atomic.MANIFEST_NAME).read_text())["facts"] | changes
    (folder / atomic.MANIFEST_NAME).unlink()
    atomic._write_manifest(folder, {key: value for key, value in facts.items() if value != "GONE"})


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": ["../../outside"]},
        {"shards": ["/tmp"]},
        {"shards": ["shard-00000", "shard-00000"]},
        {"shards": [SHARD, "shard-00001"]},
        {"shards": []},
        {"shards": 5},
        {"shards": [{}]},
        {"fingerprint": "GONE"},
        {"fingerprint": 5},
        {"tokens": "x"},
        {"tokens": 5},
        {"tokens": True},
        {"documents": -1},
        {"completion_tokens": 3},
        {"completion_tokens": "GONE"},
        {"sources": 5},
        {"sources": [{"rows": "x"}]},
        {"teacher": ["x"]},
        {"tokenizer": "GONE"},
    ],
    ids=str,
)
def test_facts_that_do_not_fit_are_refused(corpus_folder: Path, changes: dict[str, Any]) -> None:
    reseal(corpus_folder, **changes)
    with inside(corpus_folder.parent):
        with pytest.raises(DataError, match="the tokenised text is damaged"):
            load_corpus(corpus_folder)
        with pytest.raises(CheckpointError):
            inspect_text(corpus_folder, None, 3)


def falling(offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([offsets[:1], offsets[1:][::-1]])


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "offsets below 0": (OFFSETS_FILE, lambda data: np.full(len(data) // 8, -5, "<i8").tobytes()),
    "offsets that fall": (OFFSETS_FILE, lambda data: falling(np.frombuffer(data, "<i8")).tobytes()),
    "offsets beyond": (OFFSETS_FILE, lambda data: data[:-8] + np.array([2**62], "<i8").tobytes()),
    "no offsets": (OFFSETS_FILE, lambda data: b""),
    "tokens of 3 bytes": (TOKENS_FILE, lambda data: b"abc"),
    "no tokens": (TOKENS_FILE, lambda data: b""),
    "completions of more": (COMPLETION_FILE, lambda data: data + b"\0"),
    "completions of 7": (COMPLETION_FILE, lambda data: b"\7" + data[1:]),
    "no completions": (COMPLETION_FILE, lambda data: b""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_do_not_fit_are_refused(corpus_folder: Path, name: str) -> None:
    file, damage = DAMAGES[name]
    path = corpus_folder / SHARD / file
    path.write_bytes(damage(path.read_bytes()))
    reseal(corpus_folder)
    with pytest.raises(DataError, match="the tokenised text is damaged"):
        load_corpus(corpus_folder)


def test_ids_beyond_the_vocabulary_are_refused_also_when_the_text_was_checked_before(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mohawkify.data.corpus._TICK_NANOSECONDS", 0)
    path = corpus_folder / SHARD / TOKENS_FILE
    path.write_bytes(path.read_bytes()[:-4] + np.array([10**9], "<u4").tobytes())
    reseal(corpus_folder, largest_id=5)
    for _ in range(2):
        with pytest.raises(DataError, match=r"holds the id 1000000000, but the teacher's vocabulary has 258 entries"):
            load_corpus(corpus_folder, 258)
    assert load_corpus(corpus_folder).num_tokens == checked_facts(corpus_folder)["tokens"]


@pytest.mark.parametrize("folder", ["/", "/proc", "x" * 5000, "nowhere"])
def test_a_note_that_leads_to_no_corpus_is_refused_before_anything_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    def walk(path: Any, **settings: Any) -> Any:
        raise AssertionError(f"searched {path}")

    monkeypatch.setattr("os.walk", walk)
    atomic.write_json(tmp_path / "x.json", {"folder": folder, "fingerprint": "x"})
    with pytest.raises(DataError, match="the tokenised text is damaged"):
        load_corpus(read_note(tmp_path / "x.json")[0])


def test_a_note_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "x.json", {"folder": "a\0b", "fingerprint": "x"})
    with pytest.raises(CheckpointError, match="does not say where"):
        read_note(tmp_path / "x.json")


@pytest.mark.parametrize("teacher", ["some/hub-model", "https://example.org/x", "x" * 5000, "a\0b"])
def test_a_teacher_that_text_names_is_not_fetched(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError(f"looked for {arguments}")

    monkeypatch.setattr("mohawkify.data.prepare_text.resolve_teacher", fetch)
    reseal(corpus_folder, teacher=teacher)
    shown = inspect_text(corpus_folder, None, 2)["corpora"][corpus_folder.name]["shown"]
    assert [entry["text"] for entry in shown] == [None, None]
