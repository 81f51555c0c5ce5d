"""Readers of local files: bytes to records, each with its place in the file for messages.

Each reader takes (path, name for messages). A record that cannot be read is a `BadRecord`, for the caller to refuse or
to skip; a file that cannot be read at all is an `InputError`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from packloop.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRecord:
    reason: str


@dataclass(frozen=True)
class Record:
    place: str  # "line 7" or "row 7 (counting from 0)", as messages show it
    fields: dict[str, Any] | BadRecord


def row_place(index: int) -> str:
    """How messages name a row that has no line of its own."""
    return f"row {index} (counting from 0)"


def read_jsonl(path: Path | Traversable, name: str) -> list[Record]:
    """One JSON object a line; blank lines are not rows."""
    lines = _without_mark(path.read_bytes()).split(b"\n")
    return [Record(f"line {number}", _parse_line(line)) for number, line in enumerate(lines, 1) if line.strip()]


def read_json(path: Path, name: str) -> list[Record]:
    """A JSON array of objects, or an object whose "data" is one."""
    text = _decode(_without_mark(path.read_bytes()), name)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; if it is one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise InputError(
            f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}; "
            f"an array of objects is needed{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON that can be read: {error}; an array of objects is needed") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise InputError(
            f"{name}: a JSON array of objects is needed, given {_kind(value)}; "
            'write [{...}, {...}], or an object whose "data" is that'
        )
    return [Record(row_place(index), _object(item)) for index, item in enumerate(value)]


def read_csv(path: Path, name: str) -> list[Record]:
    """Comma-separated values with a header line, quoted as spreadsheets do it."""
    text = _decode(_without_mark(path.read_bytes()), name)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a text of more than 128 KiB
    try:
        return list(_csv_records(text, name))
    finally:
        csv.field_size_limit(limit)


def read_parquet(path: Path, name: str) -> list[Record]:
    """Parquet through pyarrow."""
    import pyarrow.parquet

    try:
        # Not read_table, which takes a directory called a=b for a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: not a Parquet file that can be read: {reason}; write it again") from None
    return [Record(row_place(index), row) for index, row in enumerate(rows)]


READERS: dict[str, Callable[[Path, str], list[Record]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
EXTENSIONS = tuple(READERS)


def _parse_line(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        return _object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRecord(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not JSON that can be read: {error}")


def _object(value: Any) -> dict[str, Any] | BadRecord:
    return value if isinstance(value, dict) else BadRecord(f"{_kind(value)} where an object is needed")


def _csv_records(text: str, name: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = _next_csv_row(reader)
    while header == []:
        header = _next_csv_row(reader)
    if header is None:
        return
    if isinstance(header, BadRecord):
        raise InputError(f"{name}, line 1: {header.reason}; the first line names the columns")
    repeated = [column for column in header if header.count(column) > 1]
    if repeated:
        raise InputError(f"{name}, line 1: column {repeated[0]!r} is named twice; give each column its own name")
    while True:
        place = f"line {reader.line_num + 1}"
        row = _next_csv_row(reader)
        if row is None:
            return
        if isinstance(row, BadRecord):
            yield Record(place, row)
        elif row and len(row) != len(header):
            yield Record(place, BadRecord(f"{len(row)} values for {len(header)} columns"))
        elif row:
            yield Record(place, dict(zip(header, row)))


def _next_csv_row(reader: Any) -> list[str] | BadRecord | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        return BadRecord(f"not CSV: {error}")


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(BYTE_ORDER_MARK)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}, line {line}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
