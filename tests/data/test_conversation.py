"""Rows of conversations in the forms that data sets have: what reaches the template of it, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from mohawkify.data.sources import raw_documents, to_document
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.conftest import SHARED_DATA

# Everything that a template is given, as it is given it.
SHOW_ALL = "{{ {'messages': messages, 'tools': tools, 'documents': documents} | tojson }}"
NAMES = "{# developer #}"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def given(path: Path, template: str = NAMES + SHOW_ALL, loss: str = "all", **settings: Any) -> list[Any]:
    """What the template gets of each row."""
    wanted = Source.model_validate({"path": str(path), "chat": "messages", "loss": loss, **settings})
    tokenizer = bytes_tokenizer(chat_template=template)
    found = [to_document(raw, wanted, tokenizer) for raw in raw_documents(wanted, None)]
    return [json.loads(document.text) for document in found if document is not None]


def write(folder: Path, row: dict[str, Any], kind: str = "jsonl") -> Path:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        # A second row with other keys: a table has all of them in every row, null where a row lacks them.
        other = {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}], "extra": 1}
        table = datasets.Dataset.from_list([row, other]).with_format("arrow")[:]
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path)
        else:
            import pyarrow

            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
    return path


TALK = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I call f."},
    {"role": "tool", "content": "3", "name": "f", "tool_call_id": "abc"},
    {"role": "assistant", "content": "It is 3."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"title": "Sums", "text": "1 + 2 = 3"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_every_key_and_column_reaches_the_template(tmp_path: Path, kind: str) -> None:
    found = given(write(tmp_path, {"messages": TALK, "tools": TOOLS, "documents": DOCUMENTS}, kind))[0]
    # transformers gives thoughts under an older name too.
    found["messages"][1].pop("thinking", None)
    assert found == {"messages": TALK, "tools": TOOLS, "documents": DOCUMENTS}


def test_columns_in_json_text(tmp_path: Path) -> None:
    (found,) = given(write(tmp_path, {"messages": json.dumps(TALK)}))
    assert len(found["messages"]) == len(TALK)
    for tools in (json.dumps(TOOLS), [json.dumps(TOOLS[0])], json.dumps([TOOLS[0]["function"]])):
        found = given(write(tmp_path, {"messages": TALK, "tools": tools, "documents": "[]"}))[0]
        assert found["tools"] == TOOLS
        assert found["documents"] is None
    for nothing in (None, "", [], "[]"):
        assert given(write(tmp_path, {"messages": TALK, "tools": nothing}))[0]["tools"] is None


@pytest.mark.parametrize("column", ["tools", "documents"])
def test_columns_of_another_kind_are_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {column} holds 'all of them', expected a list of objects"):
        given(write(tmp_path, {"messages": TALK, column: "all of them"}))
    assert given(write(tmp_path, {"messages": TALK, column: "all of them"}), **{column: None})[0][column] is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_other_names(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, {"messages": TALK, "functions": TOOLS}, kind)
    assert given(path)[0]["tools"] is None
    assert given(path, tools="functions")[0]["tools"] == TOOLS
    with pytest.raises(DataError, match="has no column 'function'; it has: "):
        given(path, tools="function")


MESSAGES = {
    "null beside a call": (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "no content beside a call": (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "no calls": (
        {"role": "assistant", "content": "a", "tool_calls": [], "name": None},
        {"role": "assistant", "content": "a"},
    ),
    "arguments in JSON text": (
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": CALL["function"]}]},
    ),
    "a bare call": (
        {"role": "assistant", "content": "a", "tool_calls": json.dumps([CALL["function"]])},
        {"role": "assistant", "content": "a", "tool_calls": [CALL]},
    ),
    "OpenAI's older form": (
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "OpenAI's older form of results": (
        {"role": "function", "name": "f", "content": "3"},
        {"role": "tool", "name": "f", "content": "3"},
    ),
    "ShareGPT's call": (
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "ShareGPT's result": ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
    "ShareGPT's other keys": (
        {"from": "gpt", "value": "a", "weight": 0, "reasoning_content": "b"},
        {"role": "assistant", "content": "a", "weight": 0, "reasoning_content": "b"},
    ),
    "parts of text": (
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "a b"},
    ),
    "a developer": ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_forms_of_messages(tmp_path: Path, case: str) -> None:
    written, expected = MESSAGES[case]
    (found,) = given(write(tmp_path, {"messages": [written]}))[0]["messages"]
    found.pop("thinking", None)
    assert found == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None}, "content is a NoneType, expected text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": ["a"]}, "a part of type 'str'"),
        ({"role": "assistant", "content": "", "tool_calls": [7]}, "tool_calls holds '7'"),
        ({"from": "function_call", "value": "f(1)"}, "tool_calls holds 'f"),
    ],
)
def test_messages_that_say_nothing_readable(tmp_path: Path, message: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        given(write(tmp_path, {"messages": [message]}))


def test_a_developer_is_the_system_to_templates_that_know_none(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [{"role": "developer", "content": "a"}]})
    assert given(path, SHOW_ALL)[0]["messages"] == [{"role": "system", "content": "a"}]


@pytest.mark.parametrize("loss", ["all", "completion"])
def test_what_a_template_would_leave_out_of_a_turn_is_refused(tmp_path: Path, loss: str) -> None:
    template = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls }}{% endif %}{{ m.content }}{% endfor %}"
    )
    for key, value in (("tool_calls", [CALL]), ("reasoning_content", "b")):
        path = write(tmp_path, {"messages": [{"role": "assistant", "content": "", key: value}]})
        with pytest.raises(DataError, match=f"line 1 holds {key}, which the teacher's chat template does not write"):
            given(path, template, loss)
    # Thoughts beside words are left out as the template has it.
    path = write(tmp_path, {"messages": [{"role": "assistant", "content": "7", "reasoning_content": "b"}]})
    assert given(path, template, loss) == [7]


def test_rows_that_once_failed() -> None:
    folder = SHARED_DATA / "faults" / "chat"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/faults")
    for name, number in {"tools": 64, "reasoning": 64, "null": 121, "parts": 121, "developer": 121}.items():
        assert len(given(folder / f"{name}.jsonl")) == number
