"""Datasets of a Hub that stands in over loopback: streamed, broken off, continued, refused."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mohawkify.data import write_corpus
from mohawkify.data.hub import _WAITS, _WAITS_AT_FIRST, Position
from mohawkify.data.sources import RawRow, raw_documents
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.data.hub_server import Hub, hub_server

NUM_ROWS = 260
TRAIN = "data/train-00001-of-00002.parquet"


def columns(first: int, end: int) -> dict[str, list[Any]]:
    noise = np.random.default_rng(first).integers(0, 2**60, end - first).tolist()  # cannot be compressed away
    return {
        "text": [f"row {number} {noise[number - first]}" for number in range(first, end)],
        "score": [float(number % 5) for number in range(first, end)],
    }


def parquet(first: int, end: int) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.table(columns(first, end))
    pyarrow.parquet.write_table(table, buffer, row_group_size=20, use_dictionary=False)
    return buffer.getvalue()


def jsonl(first: int, end: int) -> bytes:
    found = columns(first, end)
    rows = [{"text": text, "score": score} for text, score in zip(found["text"], found["score"], strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a dataset of two parquet files and one of two JSON files."""
    both = {
        "someone/web": {"data/train-00000-of-00002.parquet": parquet(0, 150), TRAIN: parquet(150, NUM_ROWS)},
        "someone/lines": {"train-0.jsonl": jsonl(0, 150), "train-1.jsonl": jsonl(150, NUM_ROWS)},
        "someone/empty": {"README.md": b"# nothing"},
    }
    with hub_server(Hub(both)) as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        yield server


_opened: list[list[str]] = []
sys.addaudithook(lambda event, found: [each.append(str(found[0])) for each in _opened if event == "open"] and None)


@contextmanager
def listening(opened: list[str]) -> Iterator[None]:
    """Write down every file that Python opens in the block."""
    _opened.append(opened)
    try:
        yield
    finally:
        _opened.clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait, none of which is waited for."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def read(dataset: str = "someone/web", report: Callable[[str], None] = print, **settings: Any) -> list[RawRow]:
    return list(raw_documents(Source.model_validate({"hub": dataset, **settings}), None, report=report))


def numbers(rows: list[RawRow]) -> list[int]:
    return [int(row.value.split()[1]) for row in rows]


# --- streaming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["someone/web", "someone/lines"])
def test_a_dataset_is_streamed_with_its_conditions(hub: Hub, name: str) -> None:
    rows = read(name, where=[{"column": "score", "operator": ">=", "value": 4.0}])
    assert numbers(rows) == list(range(4, NUM_ROWS, 5))
    assert rows[0].where == f"Hub dataset {name}, split train, row 5"
    fetched = {line.rsplit("/", 1)[-1] for line in hub.requests if "resolve" in line and line.startswith("GET")}
    assert {name for name in fetched if name.startswith("train")} == {
        path.rsplit("/", 1)[-1] for path in hub.datasets[name]
    }


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video", "Pdf"])
@pytest.mark.parametrize("says_so", ["in the file", "in the card"])
def test_columns_that_name_files_open_none(hub: Hub, tmp_path: Path, kind: str, says_so: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"a secret")
    feature = {"image": {"_type": kind}, "text": {"dtype": "string", "_type": "Value"}}
    table = pyarrow.table({"text": ["row 0"], "image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]})
    if says_so == "in the file":
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    hub.datasets["someone/pictures"] = {"data/train-00000-of-00001.parquet": buffer.getvalue()}
    if says_so == "in the card":
        features = f"[{{name: text, dtype: string}}, {{name: image, dtype: {kind.lower()}}}]"
        card = f"---\ndataset_info:\n  features: {features}\n---\n"
        hub.datasets["someone/pictures"]["README.md"] = card.encode()
    opened: list[str] = []
    with listening(opened):
        assert [row.value for row in read("someone/pictures")] == ["row 0"]
    assert not [path for path in opened if "secret" in path]


def test_a_column_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1 has no column 'body'; it has: text, score"):
        build_corpus(
            CorpusRequest((Source(hub="someone/web", text="body"),), bytes_tokenizer(), None, None, 258), tmp_path
        )


@pytest.mark.parametrize("name", ["someone/web", "someone/lines"])
def test_reading_goes_on_behind_any_row(hub: Hub, name: str) -> None:
    source = Source(hub=name)
    rows = read(name)
    assert numbers(rows) == list(range(NUM_ROWS))
    for index in (0, 19, 20, 149, 150, 200, NUM_ROWS - 1):
        start = Position(*json.loads(json.dumps(rows[index].after)))
        assert numbers(list(raw_documents(source, None, start=start))) == list(range(index + 1, NUM_ROWS))


def test_reading_goes_on_where_the_place_is_from_another_version(hub: Hub) -> None:
    stream = {"revision": hub.commit, "datasets": "1.0", "state": {"of another": "form"}}
    rows = list(raw_documents(Source(hub="someone/web"), None, start=Position(155, stream)))
    assert numbers(rows) == list(range(155, NUM_ROWS))
    again = list(raw_documents(Source(hub="someone/web"), None, start=rows[9].after))
    assert numbers(again) == list(range(165, NUM_ROWS))


def test_what_is_uploaded_meanwhile_is_not_read(hub: Hub) -> None:
    rows = raw_documents(Source(hub="someone/web"), None)
    first = next(rows)
    hub.commit = "f" * 40
    hub.requests.clear()
    list(rows)
    list(raw_documents(Source(hub="someone/web"), None, start=first.after))
    assert not [line for line in hub.requests if "f" * 40 in line]


# --- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("someone/web", TRAIN), ("someone/lines", "train-1.jsonl")])
@pytest.mark.parametrize("times", [1, 7])
def test_a_broken_download_goes_on_with_no_row_twice_and_none_missing(
    hub: Hub, waits: list[float], name: str, path: str, times: int
) -> None:
    """Seven times in a row is more than the Hub's own client bears: then it is our new try."""

    def fault(asked: str, first: int, number: int) -> int | None:
        return 700 if asked == path and number <= times else None

    hub.fault = fault
    said: list[str] = []
    assert numbers(read(name, said.append)) == list(range(NUM_ROWS))
    assert hub.sent[path] > times
    assert all("going on behind row" in line and "try " in line for line in said)
    assert bool(said) == (times == 7)


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_a_busy_server_is_asked_again(hub: Hub, waits: list[float], status: str) -> None:
    hub.fault = lambda path, first, number: status if path == TRAIN and number <= 8 else None
    said: list[str] = []
    assert numbers(read(report=said.append)) == list(range(NUM_ROWS))
    assert said
    assert said[0].startswith("Hub dataset someone/web, split train: ")


def test_waiting_is_bounded(hub: Hub, waits: list[float]) -> None:
    hub.fault = lambda path, first, number: "503" if path == TRAIN else None
    said: list[str] = []
    rows: list[RawRow] = []
    with pytest.raises(DataError, match="cannot read Hub dataset someone/web") as caught:
        rows.extend(raw_documents(Source(hub="someone/web"), None, report=said.append))
    assert numbers(rows) == list(range(150))
    assert len(said) == len(_WAITS)
    assert "goes on where it stopped" in str(caught.value.hint)
    assert [line.split(" in ")[1].split(" s ")[0] for line in said] == [f"{wait:g}" for wait in _WAITS]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("someone/nothing", {}, "404|not found|doesn't exist"),
        ("someone/empty", {}, "supported data files|data files"),
        ("someone/web", {"split": "test"}, "Bad split: test"),
        ("someone/web", {"name": "fr"}, "BuilderConfig 'fr' not found"),
    ],
)
def test_a_dataset_that_is_not_there_is_refused_at_once(
    hub: Hub, waits: list[float], name: str, settings: dict[str, str], expected: str
) -> None:
    with pytest.raises(DataError, match=f"cannot read Hub dataset {name}.*({expected})") as caught:
        read(name, **settings)
    assert "\n" not in caught.value.message
    assert waits == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_dataset_is_refused_at_once(hub: Hub, waits: list[float], status: int) -> None:
    hub.gated["someone/web"] = status
    with pytest.raises(DataError, match="cannot read Hub dataset someone/web") as caught:
        read()
    assert "hf auth login" in str(caught.value.hint)
    assert waits == []


def test_no_network_is_one_clear_line_within_seconds(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    begin = time.monotonic()
    said: list[str] = []
    with pytest.raises(DataError, match=r"cannot read Hub dataset someone/web, split train: .*[Cc]onnect"):
        read(report=said.append)
    assert len(said) == len(_WAITS_AT_FIRST)
    assert time.monotonic() - begin < sum(_WAITS_AT_FIRST) + 4


# --- preparing ------------------------------------------------------------------------------------------------------


def test_a_corpus_is_finished_after_the_network_was_gone(
    hub: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_corpus, "_SHARD_TOKENS", 1000)
    monkeypatch.setattr(write_corpus, "_DOCUMENTS_AT_ONCE", 16)
    where = [{"column": "score", "operator": ">", "value": 0}]
    source = Source.model_validate({"hub": "someone/web", "where": where})
    wanted = CorpusRequest((source,), bytes_tokenizer(), None, None, 258)
    whole = build_corpus(wanted, tmp_path / "whole")
    hub.fault = lambda path, first, number: "503" if path == TRAIN else None
    with pytest.raises(DataError, match="cannot read Hub dataset"):
        build_corpus(wanted, tmp_path / "c")
    hub.fault = lambda path, first, number: None
    hub.requests.clear()
    said: list[str] = []
    corpus = build_corpus(wanted, tmp_path / "c", report=said.append)
    assert said[0].startswith("going on behind ")
    assert corpus.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(np.asarray(corpus.tokens), np.asarray(whole.tokens))
