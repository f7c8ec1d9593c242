"""The rows of local text files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mohawkify.errors import DataError

if TYPE_CHECKING:
    import pyarrow

LONGEST_VALUE = 1 << 26  # bytes of a line, characters of a value; far above any document that a model learns from
LARGEST_GROWTH = 500  # of packed text; real text shrinks to a fifth
_SMALL = 1 << 20  # bytes that may unpack from anything
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 1 << 30  # of a table
_ARROW_FILE = b"ARROW1"  # how the file form begins; the stream form does not


class Row(NamedTuple):
    """One row of a table of text.

    Args:
        where: position of the row, for messages: ``train.jsonl, line 7``.
        columns: the values by column name.
        error: why they cannot be read, in a file whose other rows can.
    """

    where: str
    columns: dict[str, Any]
    error: DataError | None = None


def read_rows(
    file: Path,
    *,
    columns: Collection[str],
    text_column: str,
    separator: str | None,
    optional: Collection[str] = (),
) -> Iterator[Row]:
    """Read one file row by row, without holding it in memory.

    Args:
        file: a ``.txt``, ``.jsonl``, ``.parquet`` or ``.arrow`` file.
        columns: the columns that are used; of a ``.parquet`` or ``.arrow`` file only these are read.
        text_column: the name under which a document of a ``.txt`` file is given.
        separator: the line between two documents of a ``.txt`` file; None takes the file as one document.
        optional: columns that are read where the file has them.

    Raises:
        DataError: if the file is empty, binary, malformed or cannot be opened.
    """
    found = False
    try:
        if file.suffix == ".jsonl":
            rows = _jsonl_rows(file)
        elif file.suffix in (".parquet", ".arrow"):
            rows = _table_rows(file, columns, optional)
        else:
            rows = _text_rows(file, text_column, separator)
        for row in rows:
            found = True
            yield row
    except OSError as error:
        raise DataError(
            f"cannot read {file}: {error.strerror or error}", hint="check the file and its permissions"
        ) from error
    if not found:
        raise DataError(f"{file} is empty", hint="remove it from the data, or fill it")


def _without_nulls(value: Any) -> Any:
    """A value of a table without the keys that are null: rows lack them, but have the type of their column."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line with its newline)."""
    with file.open("rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_VALUE + 1), b""), start=1):
            if len(raw) > LONGEST_VALUE:
                raise DataError(
                    f"{file}, line {number} is longer than {LONGEST_VALUE >> 20} MB",
                    hint="break it up, or remove the file from the data",
                )
            yield number, raw


def _decoded(file: Path, number: int, raw: bytes) -> str:
    """A line, strictly decoded; a leading byte-order mark is dropped."""
    if b"\0" in raw:
        raise DataError(
            f"{file}, line {number} holds a zero byte: expected UTF-8 text, this looks binary",
            hint="remove the file from the data, or convert it to UTF-8",
        )
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}, line {number} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}",
            hint="remove the file from the data, or convert it to UTF-8",
        ) from error
    return line.replace("\r\n", "\n")


def _text_rows(file: Path, text_column: str, separator: str | None) -> Iterator[Row]:
    lines: list[str] = []
    first = 1

    def document() -> Iterator[Row]:
        text = "".join(lines).strip("\n")
        if text.strip():
            yield Row(f"{file}, line {first}", {text_column: text})

    for number, raw in _lines(file):
        line = _decoded(file, number, raw)
        if separator is not None and line.strip() == separator:
            yield from document()
            lines.clear()
            first = number + 1
        else:
            lines.append(line)
    yield from document()


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for number, raw in _lines(file):
        where = f"{file}, line {number}"
        try:
            line = _decoded(file, number, raw)
            row = Row(where, _json_object(line, where)) if line.strip() else None
        except DataError as error:
            row = Row(where, {}, error)
        if row is not None:
            yield row


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    # Besides syntax errors: integers of thousands of digits, and brackets nested too deep for the parser.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}", hint="expected one JSON object per line") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where} holds a JSON {type(value).__name__}, expected an object",
            hint='write each document as one line such as {"text": "..."}',
        )
    return value


def _table_rows(file: Path, columns: Collection[str], optional: Collection[str]) -> Iterator[Row]:
    import pyarrow

    kind = file.suffix.removeprefix(".")
    number = 0
    try:
        batches = _parquet_batches if kind == "parquet" else _arrow_batches
        for batch in batches(file, columns, optional):
            for values in _values(batch):
                number += 1
                where = f"{file}, row {number}"
                if isinstance(values, Exception):
                    error = DataError(
                        f"{where} holds what cannot be read: {' '.join(str(values).split())[:200]}",
                        hint="mend the row, or remove it",
                    )
                    yield Row(where, {}, error)
                else:
                    yield table_row(where, values)
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"{file} is not a readable {kind} file (after row {number}): {reason[0]}",
            hint="the file is damaged or of another kind; fetch it again",
        ) from error


def _values(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | Exception]:
    """The rows of a batch, or why one cannot be read: no UTF-8, dates and time zones that Python has no values for."""
    try:
        return list(batch.to_pylist())
    except (ValueError, ArithmeticError, LookupError) as error:
        if batch.num_rows == 1:
            return [error]
        return [found for number in range(batch.num_rows) for found in _values(batch.slice(number, 1))]


def table_row(where: str, values: dict[str, Any]) -> Row:
    """A row of a table as it would stand in a line of JSON."""
    for name, value in values.items():
        if isinstance(value, str | bytes) and len(value) > LONGEST_VALUE:
            error = DataError(
                f"{where}: column {name!r} holds {len(value):,} characters, expected at most {LONGEST_VALUE:,}",
                hint="break the text up, or remove the file from the data",
            )
            return Row(where, {}, error)
    return Row(where, {name: _without_nulls(value) for name, value in values.items()})


def _parquet_batches(file: Path, columns: Collection[str], optional: Collection[str]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        wanted = _wanted_columns(file, columns, optional, table.schema_arrow.names)
        for number in range(table.num_row_groups):
            size = _unpacked_bytes(file, table.metadata.row_group(number), number)
            # Every row may be the largest value of the group again, which is on the disk once.
            rows = min(_ROWS_AT_ONCE, max(1, _BYTES_AT_ONCE // max(1, size)))
            yield from table.iter_batches(batch_size=rows, row_groups=[number], columns=wanted)


def _unpacked_bytes(file: Path, group: Any, number: int) -> int:
    """The unpacked size of a row group by its metadata; a few kilobytes can be a gigabyte.

    Only the sum over the group is read: the metadata of columns in damaged files makes pyarrow end the process.
    """
    unpacked, packed = int(group.total_byte_size), file.stat().st_size
    if unpacked > max(_SMALL, LARGEST_GROWTH * packed):
        raise DataError(
            f"{file}, row group {number + 1} unpacks to {unpacked:,} bytes, the file has {packed:,}: no text does so",
            hint="remove the file from the data",
        )
    return unpacked


def _arrow_batches(file: Path, columns: Collection[str], optional: Collection[str]) -> Iterator[pyarrow.RecordBatch]:
    """Both forms of Arrow's own format: the stream, which the datasets library writes, and the file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as content:
        is_file = content.read(len(_ARROW_FILE)) == _ARROW_FILE
        content.seek(0)
        reader = pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content)
        names = _wanted_columns(file, columns, optional, reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)  # offsets in a damaged file would be followed anywhere
            wanted = batch.select(names)
            for first in range(0, wanted.num_rows, _ROWS_AT_ONCE):
                yield wanted.slice(first, _ROWS_AT_ONCE)


def _wanted_columns(file: Path, columns: Collection[str], optional: Collection[str], names: list[str]) -> list[str]:
    missing = sorted(set(columns) - set(names))
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]!r}; it has: {', '.join(names)}",
            hint="name one of these columns under data in the recipe",
        )
    return sorted({*columns, *(name for name in optional if name in names)})
