"""Any text file: its documents, or one error that names file and place."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mohawkify.data.sources import raw_documents, to_document
from mohawkify.data.tokenize import encode_documents
from mohawkify.errors import DataError, RecipeError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.mutate import PATHS, mutate_bytes, mutate_json, odd_value, render, render_twice

TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ m['tool_calls'] | tojson if m['tool_calls'] }}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Well."},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "Hi"},
]
ROW = {"text": "A cat sat.", "score": 3, "lang": "en", "good": True, "chat": CHAT, "tags": ["a", "b"], "none": None}
ROW["tools"] = [CALL["function"]]
PIECES = (
    *(
        "a",
        "A cat sat on the mat.",
        "\n",
        "\n\n",
        "<|endoftext|>",
        "<|endoftext|>\n",
        "\r\n",
        "\r",
        "\0",
        "\ufeff",
        "é",
    ),
    *(" ", "\u2028", "\x85", "<s>", "</s>", "\U0001f600", "\x1a", "---", "x" * 20_000, "<|endoftext|> \n"),
)
BROKEN = (
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\xf0\x9f\x98",
    b"\x80",
    b"\xc0\x80",
    b"\xef\xbb\xbf",
    b"\0",
    b"\xf5\x80\x80\x80",
)
COLUMNS = (*ROW, "missing", "a.b", "", "Text", "x" * 300)


def encode(suffix: str, source: dict[str, Any], content: bytes) -> bytes:
    """Write an input: a line of JSON with the kind of file and the source's keys, then the file."""
    return json.dumps({"suffix": suffix, "source": source}).encode() + b"\n" + content


def draw_source(rng: Random) -> dict[str, Any]:
    """Which columns are read, and on what conditions."""
    source: dict[str, Any] = {}
    if rng.random() < 0.3:
        source["text"] = rng.choice(COLUMNS[:-4] if rng.random() < 0.8 else COLUMNS) or "text"
    if rng.random() < 0.2:
        source["chat"] = "chat"
    if rng.random() < 0.3:
        source["separator"] = rng.choice((None, "\n", "---", "<|endoftext|>", " ", "a"))
    if rng.random() < 0.4:
        values = ("en", 3, 3.5, True, "", 2**63, -0.0, ("en", 3), (True, 1), ("a",), 10**30)
        value = rng.choice(values)
        is_list = isinstance(value, tuple)
        operator = "in" if is_list else rng.choice(("==", "!=", "<", "<=", ">", ">="))
        where = {"column": rng.choice(COLUMNS) or "a", "operator": operator, "value": list(value) if is_list else value}
        source["where"] = [where]
    return source


def draw_text(rng: Random) -> bytes:
    """A .txt file of odd pieces, some of them no UTF-8."""
    content = "".join(rng.choices(PIECES, k=rng.randint(0, 12))).encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice(BROKEN) + content[at:]
    if rng.random() < 0.2:
        content = mutate_bytes(rng, content)
    return encode(".txt", draw_source(rng), content)


def draw_lines(rng: Random) -> bytes:
    """A .jsonl file of rows with odd values."""
    lines = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        row: Any = dict(ROW)
        if rng.random() < 0.7:
            row = mutate_json(rng, row)
        if rng.random() < 0.2 and isinstance(row, dict):
            row[rng.choice(COLUMNS)] = rng.choice((odd_value(rng), *PATHS))
        line = render_twice(rng, row) if rng.random() < 0.05 else render(row)
        lines.append(line if rng.random() < 0.95 else rng.choice(PIECES))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = mutate_bytes(rng, content)
    if rng.random() < 0.02:
        content = b'{"text": "' + b"a" * 300_000 + rng.choice((b'"}', b"", b'"}\n{"text": 1}'))
    return encode(".jsonl", draw_source(rng), content)


@cache
def tables() -> list[bytes]:
    """Small .parquet files of every kind of column."""
    instant = pyarrow.array([2**62, -(2**62), 0], pyarrow.timestamp("us", tz="Europe/Berlin"))
    found = [
        {"text": ["a cat", "", None], "score": [1, 2, 3], "lang": ["en", "de", "en"], "good": [True, False, None]},
        {"text": [["a"], [], None], "chat": [CHAT[:1], None, []]},
        {"text": [{"a": 1}, None, {"a": 2}], "score": [1.5, float("nan"), float("inf")]},
        {"text": [b"\xff", b"a", b""], "lang": pyarrow.array(["en", "en", "de"]).dictionary_encode()},
        {"text": instant, "score": pyarrow.array([2**63, 1, 2], pyarrow.uint64())},
        {
            "text": pyarrow.array([2**40, 1, 2], pyarrow.time64("ns")),
            "score": pyarrow.array([1, 2, 3], pyarrow.date32()),
        },
        {"text": pyarrow.array([1, 2, 3], pyarrow.decimal128(38, 10)), "": ["a", "b", "c"]},
        {"text": pyarrow.array([2**31 - 1, 1, 2], pyarrow.date32()), "a.b": [1, 2, 3]},
        {"text": pyarrow.array([2**62, 1, 2], pyarrow.duration("s")), "good": pyarrow.nulls(3)},
    ]
    written = []
    for columns in found:
        for compression in ("none", "snappy", "zstd"):
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression=compression)
            written.append(buffer.getvalue())
    twice = io.BytesIO()
    column = pyarrow.array(["a", "b"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), twice)
    return [*written, twice.getvalue()]


def draw_parquet(rng: Random) -> bytes:
    """A .parquet file: whole, changed in its footer, or anywhere."""
    content = rng.choice(tables())
    kind = rng.random()
    if kind < 0.5:
        footer = int.from_bytes(content[-8:-4], "little")
        start = max(0, len(content) - 8 - footer)
        content = content[:start] + mutate_bytes(rng, content[start:-8]) + content[-8:]
    elif kind < 0.6:
        content = content[:-8] + rng.randbytes(4) + b"PAR1"
    elif kind < 0.95:
        content = mutate_bytes(rng, content)
    return encode(".parquet", draw_source(rng), content)


@cache
def arrow_tables() -> list[bytes]:
    """The same columns in Arrow's own format, as a stream and as a file."""
    written = []
    for content in tables():
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()
        for begin in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
            buffer = io.BytesIO()
            with begin(buffer, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
            written.append(buffer.getvalue())
    return written


def draw_arrow(rng: Random) -> bytes:
    """An .arrow file: changed anywhere, most of the time."""
    content = rng.choice(arrow_tables())
    return encode(".arrow", draw_source(rng), mutate_bytes(rng, content) if rng.random() < 0.9 else content)


@pytest.mark.parametrize(
    ("name", "number", "draw"),
    [
        ("text", 2000, draw_text),
        ("lines", 2000, draw_lines),
        ("parquet", 3000, draw_parquet),
        ("arrow", 3000, draw_arrow),
    ],
)
def test_any_file(folder: Path, name: str, number: int, draw: Callable[[Random], bytes]) -> None:
    tokenizer = bytes_tokenizer(chat_template=TEMPLATE)

    def check(case: bytes) -> None:
        head, _, content = case.partition(b"\n")
        facts = json.loads(head)
        file = folder / f"file{facts['suffix']}"
        file.write_bytes(content)
        source = facts["source"]
        for condition in source.get("where", []):
            condition["value"] = (
                tuple(condition["value"]) if isinstance(condition["value"], list) else condition["value"]
            )
        try:
            wanted = Source.model_validate({**source, "path": str(file), "where": tuple(source.get("where", []))})
            found = [to_document(raw, wanted, tokenizer) for raw in raw_documents(wanted, None)]
            texts = [document for document in found if document is not None]
            tokens = encode_documents(texts, tokenizer, 258)
        except (DataError, RecipeError) as error:
            require_message(error, str(file))
            return
        assert len(tokens) == len(texts)
        assert all(document.text.strip() and document.text.encode() for document in texts)

    run_campaign(f"data-{name}", number, draw, check)
