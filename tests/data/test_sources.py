"""Sources: what comes out of files, Hub datasets and conversations, and what is refused with which words."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mohawkify.data.sources import raw_documents, to_document
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.demo import split_stories
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
STRICT_TEMPLATE = "{% if messages[0].role != 'user' %}{{ raise_exception('user must begin') }}{% endif %}"
DATED_TEMPLATE = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


def read(teacher_directory: Path | None = None, chat_template: str | None = None, /, **source: Any) -> list[str]:
    """The documents of a source; where there are none, what a corpus of it is refused with."""
    wanted, tokenizer = Source.model_validate(source), bytes_tokenizer(chat_template=chat_template)
    found = [to_document(raw, wanted, tokenizer) for raw in raw_documents(wanted, teacher_directory)]
    texts = [document.text for document in found if document is not None]
    if not texts:
        with TemporaryDirectory() as folder:
            build_corpus(CorpusRequest((wanted,), tokenizer, None, teacher_directory, 258), Path(folder))
    return texts


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_arrow(path: Path, columns: dict[str, Any], *, is_file: bool = False) -> Path:
    """Arrow's own format: the stream, as the datasets library writes it, or the file."""
    table = pyarrow.table(columns)
    begin = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with begin(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


# --- what comes out -------------------------------------------------------------------------------------------------


def test_text_file_is_split_at_separator_lines(tmp_path: Path) -> None:
    text = "one\n\nstill one <|endoftext|> in a line\n<|endoftext|>\n\n<|endoftext|>\r\n  two\r\nlines\n"
    file = write(tmp_path / "a.txt", text)
    assert read(path=str(file)) == ["one\n\nstill one <|endoftext|> in a line", "  two\nlines"]
    assert read(path=str(file), separator="lines") == [
        "one\n\nstill one <|endoftext|> in a line\n<|endoftext|>\n\n<|endoftext|>\n  two"
    ]
    assert read(path=str(file), separator=None) == [text.replace("\r\n", "\n").strip("\n")]


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(path=str(write(tmp_path / "a.txt", "\ufeffhello"))) == ["hello"]


def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}\n\n{"text": "d"}')
    assert read(path=str(file)) == ["a\u2028b\x85c", "d"]


def test_empty_documents_are_skipped(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": "x"}])
    assert read(path=str(file)) == ["x"]


def test_parquet_gives_the_named_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"body": ["a", None, "c"], "score": [1, 2, 3]})
    assert read(path=str(file), text="body") == ["a", "c"]


def test_folder_and_glob_are_read_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "a" / "z.txt", "second")
    write_jsonl(tmp_path / "a" / "b.jsonl", [{"text": "first"}])
    write(tmp_path / "README.md", "not text")
    write(tmp_path / ".cache" / "c.txt", "hidden")
    assert read(path=str(tmp_path)) == ["first", "second", "third"]
    assert read(path=str(tmp_path / "**" / "*.txt")) == ["second", "third"]
    assert read(path=str(tmp_path / "a" / "*")) == ["first", "second"]


def test_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    assert read(path=str(write(tmp_path / "part[1].txt", "here"))) == ["here"]


def test_only_what_stands_behind_a_folders_name_is_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home [1]*"
    write(home / "run[2]" / "a.txt", "here")
    write(tmp_path / "home 1" / "run2" / "a.txt", "elsewhere")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    assert read(home / "run[2]", path="teacher:*.txt") == ["here"]
    for path in ("teacher:**/[a].txt", "~/run[[]2]/?.txt", "run[2]/*", f"{home}/run[2]/*.txt"):
        assert read(home, path=path) == ["here"]
    with pytest.raises(DataError, match="there is no file or folder"):
        read(home / "run[2]", path="teacher:b.txt")


def test_path_relative_to_the_teacher(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "beside the teacher")
    (tmp_path / "model").mkdir()
    assert read(tmp_path / "model", path="teacher:../text/a.txt") == ["beside the teacher"]


def test_demo_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(demo="validation") == split_stories("validation")
    monkeypatch.setattr("mohawkify.demo.split_stories", lambda name: [f"a story of {name}"])
    assert read(demo="train") == ["a story of train"]


def test_real_stories(stories_text: Path) -> None:
    assert len(read(path=str(stories_text / "valid.jsonl"))) == 139
    assert len(read(path=str(stories_text / "tinystories.txt"))) == 187


@pytest.mark.parametrize("is_file", [False, True])
def test_arrow_gives_the_named_column(tmp_path: Path, is_file: bool) -> None:
    columns = {"body": ["a", None, "c", "d", "e"], "score": [1, 2, 3, 4, 5]}
    file = write_arrow(tmp_path / "a.arrow", columns, is_file=is_file)
    assert read(path=str(file), text="body") == ["a", "c", "d", "e"]
    where = [{"column": "score", "operator": ">", "value": 3}]
    assert read(path=str(tmp_path), text="body", where=where) == ["d", "e"]
    assert read(path=str(tmp_path / "*.arrow"), text="body", where=where) == ["d", "e"]
    with pytest.raises(DataError, match="has no column 'text'; it has: body, score"):
        read(path=str(file))


def test_arrow_files_of_the_datasets_library(tmp_path: Path) -> None:
    rows = {"text": [f"text {number}" for number in range(1000)], "talk": [[{"role": "user", "content": "Hi"}]] * 1000}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert read(path=str(tmp_path / "saved")) == rows["text"]
    assert read(None, CHAT_TEMPLATE, path=str(tmp_path / "saved"), chat="talk")[0] == "[user] Hi</s>\n"


@pytest.mark.parametrize("is_file", [False, True])
def test_damaged_arrow(tmp_path: Path, is_file: bool) -> None:
    file = write_arrow(tmp_path / "a.arrow", {"text": [f"some text {number}" for number in range(40)]}, is_file=is_file)
    content = file.read_bytes()
    for damaged in (b"", b"hello hello hello", content[: len(content) // 2], content[:40], content[7:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.arrow is not a readable arrow file|a\.arrow is empty"):
            read(path=str(file))


# --- conditions -----------------------------------------------------------------------------------------------------

ROWS = [
    {"text": "a", "score": 3, "language": "en", "clean": True},
    {"text": "b", "score": 4.5, "language": "de", "clean": False},
    {"text": "c", "score": 4, "language": "fr", "clean": True},
    {"text": "d", "score": None, "language": "en", "clean": None},
]


@pytest.mark.parametrize(
    ("column", "operator", "value", "expected"),
    [
        ("score", "==", 4, "c"),
        ("score", "!=", 4, "ab"),
        ("score", "<", 4, "a"),
        ("score", "<=", 4.0, "ac"),
        ("score", ">", 4, "b"),
        ("score", ">=", 4.0, "bc"),
        ("score", "in", [3, 4], "ac"),
        ("language", "==", "en", "ad"),
        ("language", "in", ["fr", "de"], "bc"),
        ("clean", "==", True, "ac"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conditions(tmp_path: Path, kind: str, column: str, operator: str, value: Any, expected: str) -> None:
    if kind == "jsonl":
        file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    else:
        file = write_parquet(tmp_path / "a.parquet", {name: [row[name] for row in ROWS] for name in ROWS[0]})
    where = [{"column": column, "operator": operator, "value": value}]
    assert "".join(read(path=str(file), where=where)) == expected


def test_all_conditions_must_hold(tmp_path: Path) -> None:
    where = [
        {"column": "score", "operator": ">=", "value": 4},
        {"column": "clean", "operator": "==", "value": True},
    ]
    assert read(path=str(write_jsonl(tmp_path / "a.jsonl", ROWS)), where=where) == ["c"]


# --- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Hello"}],
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversation_is_rendered_by_the_template(tmp_path: Path, kind: str, messages: list[dict[str, Any]]) -> None:
    if kind == "jsonl":
        file = write_jsonl(tmp_path / "a.jsonl", [{"talk": messages}, {"talk": []}])
    else:
        file = write_parquet(tmp_path / "a.parquet", {"talk": [messages, []]})
    assert read(None, CHAT_TEMPLATE, path=str(file), chat="talk") == ["[user] Hi</s>\n[assistant] Hello</s>\n"]


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"talk": [{"role": "user", "content": "Hi"}]}])
    assert read(None, DATED_TEMPLATE + "{{ date_string }}", path=str(file), chat="talk") == ["26 Jul 2024"]


@pytest.mark.parametrize("template", ["{{ strftime_now('FORMAT') }}", "{%- set t = strftime_now('FORMAT') %}\n{{ t }}"])
def test_a_template_that_reads_the_clock_gives_the_same_text_every_day(tmp_path: Path, template: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"talk": [{"role": "user", "content": "Hi"}]}])
    for form in ("%Y-%m-%d", "%d %b %Y", "%A, %-d %B %y", "%H:%M:%S %p", "%j of %Y, 100%%"):
        written = read(None, template.replace("FORMAT", form), path=str(file), chat="talk")
        assert [text.strip() for text in written] == [datetime.date(2024, 7, 26).strftime(form)]
    assert read(None, "\n  {{ strftime_now is defined }}{% if true %}\n!{% endif %}", path=str(file), chat="talk") == [
        "\n  True!"
    ]


# --- what is refused ------------------------------------------------------------------------------------------------

TEXT_CASES: dict[str, tuple[str, str | bytes, str]] = {
    "empty txt": ("a.txt", "", r"a\.txt is empty"),
    "blank txt": ("a.txt", "\n<|endoftext|>\n \n", r"a\.txt is empty"),
    "empty jsonl": ("a.jsonl", "", r"a\.jsonl is empty"),
    "empty parquet": ("a.parquet", "", r"a\.parquet is not a readable parquet file"),
    "binary txt": ("a.txt", b"one\ntwo\n\x00\x01", r"a\.txt, line 3 holds a zero byte"),
    "latin-1 txt": ("a.txt", b"one\ncaf\xe9\n", r"a\.txt, line 2 is not UTF-8 text: byte 0xe9 at position 3"),
    "utf-16 txt": ("a.txt", "one".encode("utf-16"), r"a\.txt, line 1 holds a zero byte"),
    "cut-off character": ("a.txt", "é".encode()[:1], r"a\.txt, line 1 is not UTF-8 text"),
    "binary jsonl": ("a.jsonl", b"\x89PNG\r\n\x1a\n", r"a\.jsonl, line 1 is not UTF-8 text"),
    "bad json line": ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
    "json array": ("a.jsonl", '[{"text": "a"}]', r"a\.jsonl, line 1 holds a JSON list, expected an object"),
    "endless number": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"line 1 is not valid JSON"),
    "nested too deep": ("a.jsonl", "[" * 200_000, r"line 1 is not valid JSON"),
    "missing column": ("a.jsonl", '{"body": "a", "id": 1}', r"line 1 has no column 'text'; it has: body, id"),
    "text is a number": ("a.jsonl", '{"text": 7}', r"line 1: column 'text' holds a int, expected text"),
    "half a surrogate": ("a.jsonl", r'{"text": "\ud800"}', r"line 1: the text holds half a surrogate"),
    "all rows empty": ("a.jsonl", '{"text": ""}', r"holds no document: every row is empty"),
    "other kind": ("a.csv", "text\na\n", r"a\.csv is not one of the known kinds"),
    "not a parquet": ("a.parquet", "hello hello hello", r"a\.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, content, expected = TEXT_CASES[case]
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=expected) as caught:
        read(path=str(file))
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.txt", r"there is no file or folder .*none\.txt"),
        ("*.txt", r"\*\.txt matches no \.txt, \.jsonl, \.parquet, \.arrow file"),
        (".", r"matches no \.txt"),
        ("x" * 5000, "cannot read .*File name too long"),
    ],
)
def test_nothing_there(tmp_path: Path, path: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read(path=str(tmp_path / path))


def test_teacher_path_without_a_folder() -> None:
    with pytest.raises(DataError, match="teacher is not a local folder"):
        read(path="teacher:text.txt")


@pytest.mark.parametrize("truncate", [4, 100, 200])
def test_truncated_parquet(tmp_path: Path, truncate: int) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": ["some text"] * 50})
    file.write_bytes(file.read_bytes()[:-truncate])
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        read(path=str(file))


def test_parquet_damaged_in_the_middle_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"some text {number}" for number in range(1000)]})
    pyarrow.parquet.write_table(table, file, row_group_size=500, compression="zstd", use_dictionary=False)
    content = bytearray(file.read_bytes())
    start = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 300] = b"\xff" * 300
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file \(after row 500\)"):
        read(path=str(file))


def test_parquet_names_all_its_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a"], "score": [1], "url": ["u"]})
    with pytest.raises(DataError, match="has no column 'language'; it has: text, score, url"):
        read(path=str(file), where=[{"column": "language", "operator": "==", "value": "en"}])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (("language", "==", 4), r"line 1: column 'language' holds text \('en'\), but is compared with a number"),
        (("clean", ">=", 1), "column 'clean' holds a truth value"),
        (("score", "in", ["3", "4"]), "column 'score' holds a number"),
        (("text", "<", True), "compared with a truth value"),
        (("stars", ">", 1), "line 1 has no column 'stars'; it has: text, score, language, clean"),
        (("score", ">", 9), "holds no document: no row meets the conditions"),
    ],
)
def test_bad_condition(tmp_path: Path, condition: tuple[str, str, Any], expected: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    where = [dict(zip(("column", "operator", "value"), condition, strict=True))]
    with pytest.raises(DataError, match=expected):
        read(path=str(file), where=where)


def test_plain_text_has_no_columns_to_compare(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "hello")
    with pytest.raises(DataError, match="has no column 'score'; it has: text"):
        read(path=str(file), where=[{"column": "score", "operator": ">", "value": 1}])


def test_conversation_without_a_template(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"talk": [{"role": "user", "content": "Hi"}]}])
    wanted = CorpusRequest((Source(path=str(file), chat="talk"),), bytes_tokenizer(), None, None, 258)
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        build_corpus(wanted, tmp_path / "corpora")


@pytest.mark.parametrize(
    ("talk", "expected"),
    [
        ("Hi", "line 1 holds a str, expected a list of messages"),
        (["Hi"], "line 1 holds a message of unknown form: 'Hi'"),
        ([{"role": "user"}], "content is a NoneType, expected text"),
        ([{"content": "Hi"}], "line 1 holds a message of unknown form"),
        ([{"from": "narrator", "value": "Hi"}], "unknown role 'narrator'"),
        ([{"role": ["user"], "content": "Hi"}], "unknown role"),
        ([{"role": "user", "content": None}], "content is a NoneType, expected text"),
        ([{"role": "assistant", "content": "Hi"}], "template refuses the conversation: user must begin"),
    ],
)
def test_bad_conversation(tmp_path: Path, talk: Any, expected: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"talk": talk}])
    with pytest.raises(DataError, match=expected):
        read(None, STRICT_TEMPLATE, path=str(file), chat="talk")


# --- Hub datasets: tests/data/test_hub.py has the rest --------------------------------------------------------------


def test_hub_dataset_offline_gives_one_clear_error() -> None:
    program = """if True:
        from mohawkify.data.sources import raw_documents
        from mohawkify.errors import DataError
        from mohawkify.recipe.schema import Source
        try:
            next(raw_documents(Source(hub="someone/web"), None))
        except DataError as error:
            print(error.message, "|", error.hint)
    """
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    message, hint = done.stdout.strip().split(" | ")
    assert message.startswith("cannot read Hub dataset someone/web, split train: ")
    assert hint.startswith("HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set")
