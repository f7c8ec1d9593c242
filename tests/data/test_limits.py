"""Text made to fill the memory: lines and values without end, and parquet files that unpack to far more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mohawkify.data import readers
from mohawkify.data.readers import read_rows
from mohawkify.errors import DataError

SETTINGS: dict[str, Any] = {"columns": ("text",), "text_column": "text", "separator": None}


def rows(file: Path) -> list[Any]:
    """The texts of a file, or what is wrong with a row."""
    found = []
    for row in read_rows(file, **SETTINGS):
        if row.error is not None:
            raise row.error
        found.append(row.columns["text"])
    return found


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_without_end_is_not_read_to_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('{"text": "x"}\n')
    with file.open("ab") as stream:
        stream.truncate(1 << 33)  # 8 GB of zero bytes that take no place on the disk
    with pytest.raises(DataError, match=rf"{name}, line 2 is longer than 64 MB"):
        rows(file)


def test_lines_up_to_the_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_VALUE", 10)
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    assert rows(tmp_path / "a.txt") == ["0123456789"]
    (tmp_path / "a.txt").write_bytes(b"012345678\n9")
    assert rows(tmp_path / "a.txt") == ["012345678\n9"]
    (tmp_path / "a.txt").write_bytes(b"0123456789\n")
    with pytest.raises(DataError, match="line 1 is longer"):
        rows(tmp_path / "a.txt")


def write(path: Path, values: list[str], **settings: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, compression="zstd", **settings)
    return path


def test_a_row_group_that_grows_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", ["x" * 3_000_000], use_dictionary=False)
    assert file.stat().st_size < 3_000

    def read(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", read)
    with pytest.raises(DataError, match=r"a\.parquet, row group 1 unpacks to 3,0"):
        rows(file)


def test_a_value_that_stands_in_every_row_is_read_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", ["x" * 10_000, "y"] * 100)
    sizes: list[int] = []
    read = pyarrow.parquet.ParquetFile.iter_batches

    def listening(self: Any, batch_size: int, **settings: Any) -> Any:
        sizes.append(batch_size)
        return read(self, batch_size=batch_size, **settings)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", listening)
    assert len(rows(file)) == 200
    monkeypatch.setattr(readers, "_BYTES_AT_ONCE", 100_000)
    assert rows(file) == ["x" * 10_000, "y"] * 100
    assert sizes[0] == 256
    assert sizes[1] < 10


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_long_value_is_refused_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(readers, "LONGEST_VALUE", 10)
    table = pyarrow.table({"text": ["short", "0123456789", "0123456789x"]})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(DataError, match=rf"a\.{kind}, row 3: column 'text' holds 11 characters"):
        rows(file)
