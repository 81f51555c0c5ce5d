"""Rows as lines of text between a side's process and the driver. Imports no torch."""

from __future__ import annotations

import json
from typing import Any, TextIO

ROW_MARK = "row: "


def write_row(rows: TextIO, row: dict[str, Any]) -> None:
    print(ROW_MARK + json.dumps(row), file=rows, flush=True)


def read_row(line: str) -> dict[str, Any] | None:
    """The row of a line, or None where it is none."""
    return json.loads(line.removeprefix(ROW_MARK)) if line.startswith(ROW_MARK) else None


def is_measured(row: dict[str, Any]) -> bool:
    return {"failed", "out_of_memory", "skipped"}.isdisjoint(row)
