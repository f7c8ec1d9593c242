"""Rows that cannot be read among many that can: passed over as far as the recipe allows, counted, and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mohawkify.data import readers, write_corpus
from mohawkify.data.corpus import checked_facts
from mohawkify.data.readers import table_row
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import DataError, RecipeError
from mohawkify.recipe.loading import apply_overrides, comparable_text
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.conftest import SHARED_DATA
from tests.data.test_stage_text import reader, recipe_for
from tests.data.test_write_corpus import Killed, content_of, kill_at

CHAT = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}"
)


def talk(content: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


GOOD = [talk("a" * (index % 7 + 1)) for index in range(40)]
BAD = {3: talk("a", "narrator"), 9: talk("refuse"), 10: talk("refuse"), 25: talk("b", "x"), 39: talk("refuse")}
ROWS = [{"talk": BAD.get(index, good)} for index, good in enumerate(GOOD)]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{len(rows)}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


def want(*paths: Path, skip: int = 0, **settings: Any) -> CorpusRequest:
    parts = tuple(Source.model_validate({"path": str(path), "chat": "talk", **settings}) for path in paths)
    return CorpusRequest(parts, bytes_tokenizer(chat_template=CHAT), None, None, 258, skip)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_bad_rows_are_passed_over_up_to_a_number(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)
    good = write(tmp_path, kind, [row for index, row in enumerate(ROWS) if index not in BAD])
    corpus = build_corpus(want(path, skip=5), tmp_path / "c")
    assert corpus.fingerprint == build_corpus(want(good), tmp_path / "c").fingerprint
    assert corpus.bad_rows == 5
    assert corpus.first_error is not None
    assert corpus.first_error.endswith(
        f"{path}, {'line' if kind == 'jsonl' else 'row'} 4 holds a message of unknown role 'narrator'"
    )
    with pytest.raises(DataError, match=r"4 holds a message of unknown role 'narrator'$") as caught:
        build_corpus(want(path), tmp_path / "strict")
    assert str(caught.value.hint).endswith("or pass over so many bad rows: data.skip_bad_rows, a number")
    with pytest.raises(DataError, match=r"40: .* no; data\.skip_bad_rows, 4, were passed over before it"):
        build_corpus(want(path, skip=4), tmp_path / "four")


@pytest.mark.parametrize("weight", [None, 1.0])
def test_killed_calls_and_processes_count_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float | None
) -> None:
    monkeypatch.setattr(write_corpus, "_SHARD_TOKENS", 40)
    monkeypatch.setattr(write_corpus, "_DOCUMENTS_AT_ONCE", 3)
    (tmp_path / "other").mkdir()
    wanted = want(
        write(tmp_path, "jsonl", ROWS), write(tmp_path / "other", "parquet", ROWS[::-1]), skip=10, weight=weight
    )
    build_corpus(wanted, tmp_path / "whole")
    facts = checked_facts(tmp_path / "whole" / wanted.key)
    assert [source["bad_rows"] for source in facts["sources"]] == [5, 5]
    assert len(facts["shards"]) > 5
    for number, place in enumerate(range(1, facts["tokens"], 61)):
        with pytest.raises(Killed):
            build_corpus(wanted, tmp_path / f"c{number}", progress=kill_at(place))
        build_corpus(wanted, tmp_path / f"c{number}")
        assert content_of(tmp_path / f"c{number}") == content_of(tmp_path / "whole")
    if weight is None:
        build_corpus(wanted, tmp_path / "process", num_workers=1)
        assert content_of(tmp_path / "process") == content_of(tmp_path / "whole")


def test_rows_behind_the_text_that_is_needed_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", ROWS)
    few = replace(want(path), num_tokens=9)
    assert build_corpus(few, tmp_path / "c").bad_rows == 0


LINES = {
    "no JSON": b'{"text": \n',
    "no object": b'["a"]\n',
    "no UTF-8": b'{"text": "caf\xe9"}\n',
    "a zero byte": b'{"text": "\0"}\n',
    "another column": b'{"body": "a"}\n',
    "a number": b'{"text": 7}\n',
    "half a surrogate": b'{"text": "\\ud800"}\n',
    "a condition": b'{"text": "a", "score": "high"}\n',
}


@pytest.mark.parametrize("case", LINES)
def test_lines_that_are_passed_over(tmp_path: Path, case: str) -> None:
    good = b'{"text": "a", "score": 1}\n'
    (tmp_path / "a.jsonl").write_bytes(good + LINES[case] + good)
    where = [{"column": "score", "operator": ">", "value": 0}] if case == "a condition" else []
    wanted = want(tmp_path / "a.jsonl", skip=1, chat=None, where=where)
    corpus = build_corpus(wanted, tmp_path / "c")
    assert (corpus.num_documents, corpus.bad_rows) == (2, 1)
    with pytest.raises(DataError, match="line 2"):
        build_corpus(replace(wanted, skip_bad_rows=0), tmp_path / "strict")


def test_a_value_that_is_too_long_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a Hub dataset, whose rows are made by the same function."""
    monkeypatch.setattr(readers, "LONGEST_VALUE", 10)
    assert table_row("row 1", {"text": "0123456789"}).error is None
    assert "row 2: column 'text' holds 11 characters" in str(table_row("row 2", {"text": "0123456789x"}).error)


def test_values_of_a_table_that_are_no_text(tmp_path: Path) -> None:
    values = pyarrow.array([b"a", b"caf\xe9", b"b"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *values.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    corpus = build_corpus(want(tmp_path / "a.parquet", skip=1, chat=None), tmp_path / "c")
    assert (corpus.num_documents, corpus.bad_rows) == (2, 1)
    assert "a.parquet, row 2 holds what cannot be read" in str(corpus.first_error)


def test_a_source_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every row is empty, or one of 5 that were passed over"):
        build_corpus(want(write(tmp_path, "jsonl", [ROWS[index] for index in BAD]), skip=5), tmp_path / "c")


def test_it_is_said_at_the_end_and_a_lower_limit_refuses_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 7}\n' + "".join(f'{{"text": "{index:019d}"}}\n' for index in range(100)))
    said: list[str] = []
    allowed = recipe_for(path, "data.skip_bad_rows=2")
    for _ in range(2):  # made, and found
        reader(allowed, tmp_path, report=said.append).corpus("train")
    first = f"{path}, line 1: column 'text' holds a int, expected text"
    assert said == [f"data.train: bad rows passed over: 1; the first: {first}"] * 2
    with pytest.raises(DataError, match=r"made without 1 bad rows, more than data\.skip_bad_rows, 0"):
        reader(recipe_for(path), tmp_path).corpus("train")


def test_the_limit_makes_no_other_run(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    assert comparable_text(apply_overrides(recipe, ["data.skip_bad_rows=1k"])) == comparable_text(recipe)
    with pytest.raises(RecipeError, match="skip_bad_rows"):
        apply_overrides(recipe, ["data.skip_bad_rows=-1"])


def test_rows_that_once_failed(tmp_path: Path) -> None:
    path = SHARED_DATA / "faults" / "chat" / "onebad.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared/data/faults")
    wanted = replace(want(path, skip=1), sources=(Source(path=str(path), chat="messages"),))
    corpus = build_corpus(wanted, tmp_path)
    assert (corpus.num_documents, corpus.bad_rows) == (120, 1)
