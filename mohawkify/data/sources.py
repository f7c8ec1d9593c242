"""Where text comes from: local files, Hub datasets and the demo stories, as one stream of documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawkify.data.conditions import column_value, meets_all
from mohawkify.data.conversation import render_conversation, require_chat_template
from mohawkify.data.files import Row, find_files, read_rows
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawkify.recipe import Source


def documents(source: Source, tokenizer: PreTrainedTokenizerBase, teacher_directory: Path | None) -> Iterator[str]:
    """Yield the documents of a source in their own order; files are read in sorted order, empty documents are skipped.

    Args:
        source: where the text is and which rows and columns of it are used.
        tokenizer: the teacher's; its chat template renders conversations.
        teacher_directory: the teacher's folder, for paths relative to it.

    Raises:
        DataError: if the text is missing, malformed, or there is not a single document.
    """
    if source.chat is not None:
        require_chat_template(tokenizer)
    found = False
    for row in _rows(source, teacher_directory):
        if not meets_all(row, source.where):
            continue
        text = _text(row, source, tokenizer)
        if text.strip():
            found = True
            yield text
    if not found:
        why = "no row meets the conditions, or all that do are empty" if source.where else "every row is empty"
        raise DataError(f"{describe(source)} holds no document: {why}", hint="check the entry under data in the recipe")


def describe(source: Source) -> str:
    """Name a source in messages."""
    if source.hub is not None:
        configuration = f" ({source.name})" if source.name else ""
        return f"Hub dataset {source.hub}{configuration}, split {source.split}"
    if source.demo is not None:
        return f"the demo stories ({source.demo})"
    return str(source.path)


def source_identity(source: Source, teacher_directory: Path | None) -> dict[str, Any]:
    """Return what tells one state of a source from another, as JSON values, without reading large files.

    Local files count with path, size and time of change; the demo stories with their content. A Hub dataset counts
    with its name alone: whether it has changed since cannot be known without reading it.
    """
    identity: dict[str, Any] = {"source": source.model_dump(mode="json")}
    if source.path is not None:
        files = [(file.resolve(), file.stat()) for file in find_files(source.path, teacher_directory)]
        identity["files"] = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in files]
    elif source.demo is not None:
        stories = json.dumps([row.columns for row in _demo_rows(source)])
        identity["stories"] = hashlib.sha256(stories.encode()).hexdigest()
    return identity


def _rows(source: Source, teacher_directory: Path | None) -> Iterator[Row]:
    if source.hub is not None:
        yield from _hub_rows(source)
    elif source.demo is not None:
        yield from _demo_rows(source)
    else:
        assert source.path is not None  # the recipe takes exactly one of path, hub and demo
        columns = {source.chat or source.text, *(condition.column for condition in source.where)}
        for file in find_files(source.path, teacher_directory):
            yield from read_rows(file, columns=columns, text_column=source.text, separator=source.separator)


def _demo_rows(source: Source) -> Iterator[Row]:
    from mohawkify.demo import split_stories

    assert source.demo is not None
    for number, story in enumerate(split_stories(source.demo), start=1):
        yield Row(f"{describe(source)}, story {number}", {source.text: story})


def _hub_rows(source: Source) -> Iterator[Row]:
    import datasets

    # Names, network, formats and decoders fail in errors of half a dozen libraries that share no base class.
    try:
        rows = datasets.load_dataset(source.hub, source.name, split=source.split, streaming=True)
        for number, columns in enumerate(rows, start=1):
            yield Row(f"{describe(source)}, row {number}", dict(columns))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read {describe(source)}: {reason[0]}", hint=_hub_hint()) from error


def _hub_hint() -> str:
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return "HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set: unset it, or use local files"
    return "check name, configuration and split on the Hub, the network, and `hf auth login` for gated datasets"


def _text(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    column = source.chat or source.text
    value = column_value(row, column)
    if value is None:
        return ""
    if source.chat is not None:
        value = render_conversation(value, tokenizer, row.place)
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: column {column!r} holds a {type(value).__name__}, expected text",
            hint="name the column that holds the text with `text` under data",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.place}: the text holds half a surrogate pair, which is not valid Unicode") from error
    return value
