"""Where rows come from: the bundled sample, a local json, jsonl, csv or parquet file, or a data set on the Hub.

Rows come out as dictionaries of text under the template's field names. What cannot be read is an `InputError` of one
line that says where it is; under `on_bad_row="skip"` a bad row is left out, counted and remembered with its reason.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from packloop.data.files import EXTENSIONS, READERS, BadRecord, Record, read_jsonl, row_place
from packloop.errors import ConfigError, InputError

BUNDLED = "bundled"
BUNDLED_SPLITS = {"train": "train.jsonl", "heldout": "heldout.jsonl"}

# Column names under which other data sets keep what a template calls by the key.
SYNONYMS = {
    "instruction": ("prompt", "question", "query"),
    "response": ("output", "completion", "answer", "text"),
    "output": ("response", "completion", "answer", "text"),
    "input": ("context",),
    "context": ("input",),
}

# Endings that say "a file": such a source is never looked up on the Hub, whether or not packloop can read it.
FILE_ENDINGS = (*EXTENSIONS, ".txt", ".tsv", ".xlsx", ".xls", ".gz", ".zip", ".zst", ".xz", ".arrow", ".yaml", ".yml")

BadRowPolicy = Literal["error", "skip"]


class MissingColumns(InputError):
    """The rows have no column for some fields. fields: those; found: the columns that there are."""

    def __init__(self, message: str, fields: Sequence[str], found: Sequence[str]) -> None:
        super().__init__(message)
        self.fields, self.found = list(fields), list(found)


@dataclass(frozen=True)
class SkippedRow:
    index: int  # in the source, from 0
    reason: str


@dataclass(frozen=True)
class Rows:
    """Rows in the source's order. `row_ids[i]` is the place of `rows[i]` in the source, from 0."""

    rows: list[dict[str, str]]
    row_ids: list[int]
    skipped: list[SkippedRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def load_rows(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    texts: Sequence[Sequence[str]] = (),
    on_bad_row: BadRowPolicy,
    named: str = "data.source",
) -> Rows:
    """Rows of `source` with the fields `required` and `optional`, each read from column `columns.get(field, field)`.

    An optional field that a row lacks is empty text. texts: groups of fields; a row that leaves all fields of a group
    blank is a bad one. `split` and `revision` apply to the Hub, `split` to the bundled sample too. named: the setting
    or option that said `source`, for messages. Raises `InputError`, and `ConfigError` for a file that is not there and
    a `columns` key that is no field.
    """
    unknown = [key for key in columns if key not in (*required, *optional)]
    if unknown:
        raise ConfigError(
            f"data.columns: {unknown[0]!r} is no field of the template; its fields: {', '.join([*required, *optional])}"
        )
    name, records = _read(source, split, revision, named)
    column_of = {name: columns.get(name, name) for name in (*required, *optional)}
    if not records:
        raise InputError(f"{name}: it holds no rows; at least one is needed")
    needed = [*required, *(key for key in optional if key in columns)]
    _require_columns(name, records, [column_of[key] for key in needed], column_of)

    rows, row_ids, skipped = [], [], []
    for index, record in enumerate(records):
        row = _mapped(record, column_of, optional, texts)
        if isinstance(row, dict):
            rows.append(row)
            row_ids.append(index)
        elif on_bad_row == "skip":
            skipped.append(SkippedRow(index, row))
        else:
            raise InputError(f"{name}, {record.place}: {row}; mend it, or set data.on_bad_row=skip")
    if not rows:
        raise InputError(f"{name}: none of its {len(skipped)} rows can be used; the first: {skipped[0].reason}")
    return Rows(rows, row_ids, skipped)


def split_rows(rows: Rows, eval_split: int | float, seed: int) -> tuple[Rows, Rows]:
    """(train, held-out) rows, drawn by `seed`, each in the source's order; skipped rows stay with train.

    `eval_split` is a count or, as a float below 1, a fraction of the rows (at least one row unless it is 0). Raises
    `ConfigError` where nothing would be left to train on.
    """
    count = eval_split if isinstance(eval_split, int) else (max(1, round(eval_split * len(rows))) if eval_split else 0)
    if count and count >= len(rows):
        raise ConfigError(
            f"data.eval_split={eval_split} holds out {count} of {len(rows)} rows and leaves none to train on; "
            "use a smaller number"
        )
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count]] = True

    def part(wanted: bool, skipped: list[SkippedRow]) -> Rows:
        chosen = np.flatnonzero(held_out == wanted).tolist()
        return Rows([rows.rows[i] for i in chosen], [rows.row_ids[i] for i in chosen], skipped)

    return part(False, rows.skipped), part(True, [])


def load_train_and_eval(
    source: str,
    *,
    split: str,
    eval_split: int | float | str,
    seed: int,
    revision: str | None = None,
    columns: Mapping[str, str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    texts: Sequence[Sequence[str]] = (),
    on_bad_row: BadRowPolicy,
) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows held out (None where `eval_split` is 0): a share of `split`, or another split."""
    options = {
        "revision": revision,
        "columns": columns,
        "required": required,
        "optional": optional,
        "texts": texts,
        "on_bad_row": on_bad_row,
    }
    if isinstance(eval_split, str):
        if source != BUNDLED and is_local(source):
            _existing_file(source, "data.source")
            raise ConfigError(
                f"data.eval_split={eval_split!r}: {source} is a file and has no splits; "
                "give a count or a fraction of its rows"
            )
        if eval_split == split:
            raise ConfigError(f"data.eval_split={eval_split!r} is the split that is trained on; name another")
        return load_rows(source, split=split, **options), load_rows(source, split=eval_split, **options)
    rows = load_rows(source, split=split, **options)
    if not eval_split:
        return rows, None
    return split_rows(rows, eval_split, seed)


def is_local(source: str) -> bool:
    """Whether `source` means a file: such a source is never looked up on the Hub."""
    parent = os.path.dirname(source)
    return (
        source.lower().endswith(FILE_ENDINGS)
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or os.path.exists(source)
        or (parent != "" and os.path.isdir(parent))
    )


def _read(source: str, split: str, revision: str | None, named: str) -> tuple[str, list[Record]]:
    """(name for messages, records) of a source, which `named` says."""
    if not source.strip():
        raise ConfigError(f"data.source={source!r}: name a file, a data set on the Hub, or {BUNDLED}")
    if source == BUNDLED:
        return f"{BUNDLED} ({split})", _read_bundled(split)
    if not is_local(source):
        return f"{source} ({split})", _read_hub(source, split, revision)
    return source, _read_file(source, named)


def _read_bundled(split: str) -> list[Record]:
    if split not in BUNDLED_SPLITS:
        raise ConfigError(f"{BUNDLED}: it has no split {split!r}; its splits: {', '.join(BUNDLED_SPLITS)}")
    file = importlib.resources.files("packloop") / "bundled" / "data" / BUNDLED_SPLITS[split]
    try:
        return read_jsonl(file, f"{BUNDLED} ({split})")
    except FileNotFoundError:
        raise InputError(
            f"{BUNDLED} ({split}): {file} is missing from this installation; install packloop again"
        ) from None


def _read_file(source: str, named: str) -> list[Record]:
    path = _existing_file(source, named)
    with _closed_files_named(source):
        return READERS[path.suffix.lower()](path, source)


@contextmanager
def _closed_files_named(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{source}: it cannot be read: {error.strerror or error}; check its permissions") from None


def _existing_file(source: str, named: str) -> Path:
    """The file that `source` means. `ConfigError` where there is none that can be read."""
    with _closed_files_named(source):
        # os.path rather than Path for the probes: it answers no where a name is too long or a directory is closed.
        path = Path(os.path.expanduser(source))
        extension = path.suffix.lower()
        if os.path.isdir(path):
            inside = sorted(child.name for child in path.iterdir() if child.suffix.lower() in EXTENSIONS)
            remedy = f"name a file in it: {', '.join(inside[:5])}" if inside else f"name a {_one_of(EXTENSIONS)} file"
            raise ConfigError(f"{source}: this is a directory; {remedy}")
        if extension not in EXTENSIONS:
            absent = "" if os.path.exists(path) else " (and no such file exists)"
            raise ConfigError(
                f"{source}: files ending in {extension or 'nothing'!r} are not read{absent}; "
                f"save the rows as {_one_of(EXTENSIONS)}"
            )
        if not os.path.exists(path):
            beside = [child.name for child in path.parent.iterdir()] if os.path.isdir(path.parent) else []
            near = difflib.get_close_matches(path.name, beside, n=1)
            remedy = f"did you mean {path.with_name(near[0])}?" if near else f"check {named}"
            raise ConfigError(f"{source}: no such file; {remedy}")
        return path


def _read_hub(source: str, split: str, revision: str | None) -> list[Record]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ConfigError(
            f"data.source={source!r}: neither a file nor a Hub name (owner/name); give one of them, or {BUNDLED}"
        )
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # The Hub's HTTP library differs between its releases; its root error is a base of HfHubHTTPError in all of them.
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__)
    try:
        rows = datasets.load_dataset(source, split=split, revision=revision)
    except failures as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"Hub data set {source!r}, split {split!r}, cannot be loaded: {reason}; check the name, the split, "
            "data.revision and the network (or log in with `hf auth login`), or give a local file"
        ) from None
    return [Record(row_place(index), row) for index, row in enumerate(rows)]


def _require_columns(name: str, records: list[Record], wanted: list[str], column_of: dict[str, str]) -> None:
    """Raise unless each wanted column occurs in some record; a record that alone lacks one is a bad row, not this."""
    found = dict.fromkeys(key for record in records if isinstance(record.fields, dict) for key in record.fields)
    if not found:
        first = next((record for record in records if isinstance(record.fields, BadRecord)), None)
        problem = f"{first.place}: {first.fields.reason}" if first else "its rows have no columns"
        raise InputError(f"{name}, {problem}; none of its {len(records)} rows can be read, so mend the file")
    missing = [column for column in wanted if column not in found]
    if missing:
        field_of = {column: field_name for field_name, column in column_of.items()}
        renames = {field_of[column]: _likely(field_of[column], found, wanted) for column in missing}
        known = {key: value for key, value in renames.items() if value}
        shown = ", ".join(f"{key}: {value}" for key, value in known.items()) or f"{field_of[missing[0]]}: COLUMN"
        raise MissingColumns(
            f"{name}: no column {', '.join(map(repr, missing))}; found: {', '.join(map(str, found))}; "
            f"expected: {', '.join(wanted)}; say which column is meant with data.columns={{{shown}}}, "
            "or choose another data.template",
            fields=[field_of[column] for column in missing],
            found=[str(column) for column in found],
        )


def _likely(field_name: str, found: Mapping[str, Any], wanted: list[str]) -> str | None:
    """The column that `field_name` most likely is called in this source."""
    free = [column for column in found if column not in wanted]
    for synonym in SYNONYMS.get(field_name, ()):
        if synonym in free:
            return synonym
    return next(iter(difflib.get_close_matches(field_name, free, n=1)), None)


def _mapped(
    record: Record, column_of: dict[str, str], optional: Sequence[str], texts: Sequence[Sequence[str]]
) -> dict[str, str] | str:
    """The template's fields of a record, or what is wrong with it."""
    if isinstance(record.fields, BadRecord):
        return record.fields.reason
    row = {}
    for name, column in column_of.items():
        value = record.fields.get(column)
        if value is None and name in optional:
            value = ""
        elif column not in record.fields:
            return f"no field {column!r}; it has {', '.join(record.fields) or 'none'}"
        if not isinstance(value, str):
            return f"field {column!r} is {_shown(value)}, and text is needed"
        if not _is_encodable(value):
            return f"field {column!r} holds half of a surrogate pair, which is no character"
        row[name] = value
    for group in texts:
        if not any(row[name].strip() for name in group):
            columns = [repr(column_of[name]) for name in group]
            be = "fields {} are" if len(columns) > 1 else "field {} is"
            return f"{be.format(' and '.join(columns))} blank, and text is needed"
    return row


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), f"of type {type(value).__name__}")
    return f"{kind} ({' '.join(reprlib.repr(value).split())})"


def _one_of(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
