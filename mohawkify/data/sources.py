"""Where text comes from: local files, Hub datasets and the demo stories, as one stream of documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mohawkify.data.chat import render_conversation, require_written
from mohawkify.data.completions import completion_spans
from mohawkify.data.conversation import Messages, read_conversation
from mohawkify.data.filters import column_value, meets_all
from mohawkify.data.hub import BEGINNING, After, Position, Report, hub_rows, ignore
from mohawkify.data.readers import Row, read_rows
from mohawkify.data.text_files import find_files
from mohawkify.data.tokenize import Document
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawkify.recipe.schema import Source


class RawRow(NamedTuple):
    """The text or conversation of a row, not yet tokenised.

    Args:
        where: position of the row, for messages.
        value: text, or a conversation.
        after: where reading goes on behind the row.
        beside: what else the template is given with a conversation.
        error: why the row holds neither.
    """

    where: str
    value: Any
    after: Position
    beside: Mapping[str, Any] | None = None
    error: DataError | None = None


def raw_documents(
    source: Source, teacher_directory: Path | None, *, start: Position = BEGINNING, report: Report = ignore
) -> Iterator[RawRow]:
    """Yield what the rows of a source hold that meet its conditions, in the source's own order, files sorted by path.

    Args:
        source: where the text is and which rows and columns of it are used.
        teacher_directory: the teacher's folder, for paths relative to it.
        start: where reading begins: the beginning, or the place after a row that was read before.
        report: receives a line for every try to reach the Hub again.

    Raises:
        DataError: if the text is missing or malformed; what is wrong with a single row is its `error`.
    """
    for row, after in _rows(source, teacher_directory, start, report):
        try:
            if row.error is not None:
                raise row.error
            if not meets_all(row, source.where):
                continue
            value = column_value(row, source.chat or source.text)
            beside = {
                name: column_value(row, column)
                for name, column in _beside(source).items()
                if column in row.columns or column != name
            }
        except DataError as error:
            yield RawRow(row.where, None, after(), error=error)
            continue
        yield RawRow(row.where, value, after(), beside or None)


def to_document(raw: RawRow, source: Source, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    """Turn what a row holds into text; None where it is empty.

    Raises:
        DataError: if it is no text, or no conversation that the teacher's chat template takes.
    """
    if raw.error is not None:
        raise raw.error
    if raw.value is None:
        return None
    document = _chat_document(raw, source, tokenizer) if source.chat else Document(_checked_text(raw, source.text))
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{raw.where}: the text holds half a surrogate pair, which is not valid Unicode") from error
    return document if document.text.strip() else None


def empty_source(source: Source, num_bad_rows: int) -> DataError:
    """The refusal of a source without a single document."""
    why = "no row meets the conditions, or all that do are empty" if source.where else "every row is empty"
    why += f", or one of {num_bad_rows:,} that were passed over" if num_bad_rows else ""
    return DataError(f"{describe(source)} holds no document: {why}", hint="check the entry under data in the recipe")


def describe(source: Source) -> str:
    """Name a source in messages."""
    if source.hub is not None:
        configuration = f" ({source.name})" if source.name else ""
        return f"Hub dataset {source.hub}{configuration}, split {source.split}"
    if source.demo is not None:
        return f"the demo stories ({source.demo})"
    return str(source.path)


def source_identity(source: Source, teacher_directory: Path | None) -> dict[str, Any]:
    """Facts that identify the state of a source, as JSON values, without reading large files.

    Local files count with path, size and time of change; the demo stories with their content. A Hub dataset counts
    with its name alone: a change is not detected without reading it.
    """
    identity: dict[str, Any] = {"source": source.model_dump(mode="json")}
    if source.path is not None:
        files = [(file.resolve(), file.stat()) for file in find_files(source, teacher_directory)]
        identity["files"] = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in files]
    elif source.demo is not None:
        stories = json.dumps([row.columns for row in _demo_rows(source)])
        identity["stories"] = hashlib.sha256(stories.encode()).hexdigest()
    return identity


def _rows(
    source: Source, teacher_directory: Path | None, start: Position, report: Report
) -> Iterator[tuple[Row, After]]:
    if source.hub is not None:
        yield from hub_rows(source, describe(source), start, report)
        return
    rows = _demo_rows(source) if source.demo is not None else _file_rows(source, teacher_directory)
    for number, row in enumerate(rows, start=1):
        if number > start.rows:
            yield row, partial(Position, number)


def _demo_rows(source: Source) -> Iterator[Row]:
    from mohawkify.demo import split_stories

    assert source.demo is not None
    for number, story in enumerate(split_stories(source.demo), start=1):
        yield Row(f"{describe(source)}, story {number}", {source.text: story})


def _file_rows(source: Source, teacher_directory: Path | None) -> Iterator[Row]:
    beside = _beside(source)
    named = {column for name, column in beside.items() if column != name}
    columns = {source.chat or source.text, *(condition.column for condition in source.where), *named}
    for file in find_files(source, teacher_directory):
        yield from read_rows(
            file,
            columns=columns,
            text_column=source.text,
            separator=source.separator,
            optional=beside.values(),
        )


def _beside(source: Source) -> dict[str, str]:
    """The columns that are given to the template beside a conversation; rows may lack those that nobody named."""
    columns = {"tools": source.tools, "documents": source.documents}
    return {name: column for name, column in columns.items() if column is not None and source.chat is not None}


def _chat_document(raw: RawRow, source: Source, tokenizer: PreTrainedTokenizerBase) -> Document:
    conversation = read_conversation(raw.value, raw.beside or {}, raw.where)

    def render(messages: Messages, prompt: bool = False) -> str:
        others = conversation._replace(messages=messages)
        return render_conversation(others, tokenizer, raw.where, add_generation_prompt=prompt)

    text = render(conversation.messages)
    require_written(conversation, text, render, raw.where)
    if source.loss == "all":
        return Document(text)
    spans = completion_spans(
        conversation.messages,
        text,
        render,
        special_tokens=tokenizer.all_special_tokens,
        end_token=tokenizer.eos_token,
        where=raw.where,
    )
    return Document(text, spans)


def _checked_text(raw: RawRow, column: str) -> str:
    if not isinstance(raw.value, str):
        raise DataError(
            f"{raw.where}: column {column!r} holds a {type(raw.value).__name__}, expected text",
            hint="name the column that holds the text with `text` under data",
        )
    return raw.value
