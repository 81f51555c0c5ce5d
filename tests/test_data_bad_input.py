"""Bad input, every kind of it: one line that names the file, the place and the remedy; or a skip with a count."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from packloop.data.sources import load_rows
from packloop.errors import InputError

FIELDS = ("instruction", "response")
GOOD = [{"instruction": f"Write {n}.", "response": f"{n},\n“quoted” 漢"} for n in range(4)]
FORMATS = ["json", "jsonl", "csv", "parquet"]


def load(path, *, required=FIELDS, optional=(), columns=None, on_bad_row="error", **options):
    return load_rows(
        str(path), columns=columns or {}, required=required, optional=optional, on_bad_row=on_bad_row, **options
    )


def rows_or_message(path, **options):
    try:
        return load(path, **options)
    except InputError as error:
        return str(error)


def message_of(path, **options):
    """The error that loading gives: one line, exit code 1."""
    with pytest.raises(InputError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


FILE_CASES = {
    "malformed line": ("x.jsonl", b'{"instruction": "a", "response": "b"}\n{"instruction": \n', ", line 2: not JSON: "),
    "line that is an array": (
        "x.jsonl",
        b'{"instruction": "a", "response": "b"}\n\n["a"]\n',
        ", line 3: an array where an object is needed; mend it, or set data.on_bad_row=skip",
    ),
    "line that is a number": ("x.jsonl", b'{"instruction": "a", "response": "b"}\n7\n', ", line 2: a number where"),
    "line that is null": ("x.jsonl", b'{"instruction": "a", "response": "b"}\nnull\n', ", line 2: null where"),
    "two objects a line": (
        "x.jsonl",
        b'{"instruction": "a", "response": "b"} {}\n{}',
        ", line 1: not JSON: Extra data",
    ),
    "deeply nested line": (
        "x.jsonl",
        b'{"instruction": "a", "response": "b"}\n' + b"[" * 100_000,
        ", line 2: not JSON that",
    ),
    "endless number": (
        "x.jsonl",
        b'{"instruction": "a", "response": "b"}\n{"n": ' + b"9" * 5000 + b"}",
        ", line 2: not JSON that can be read: Exceeds",
    ),
    "line not UTF-8": (
        "x.jsonl",
        b'{"instruction": "a", "response": "b"}\n{"instruction": "caf\xe9", "response": "b"}\n',
        ", line 2: not UTF-8: byte 0xe9 at offset 20 of the line",
    ),
    "UTF-16 jsonl": (
        "x.jsonl",
        '{"instruction": "a"}\n'.encode("utf-16"),
        ", line 1: not UTF-8: byte 0xff at offset 0",
    ),
    "lone surrogate": (
        "x.jsonl",
        b'{"instruction": "\\ud800", "response": "b"}',
        ", line 1: field 'instruction' holds half of a surrogate pair",
    ),
    "json malformed": ("x.json", b'[{"instruction": "a",]', ", line 1, column 22: not JSON: "),
    "json cut short": ("x.json", b'[{"instruction": "a"}', ", line 1, column 22: not JSON: "),
    "json that is jsonl": ("x.json", b'{"instruction": "a"}\n{"instruction": "b"}', "name it .jsonl"),
    "json object": ("x.json", b'{"rows": []}', ": a JSON array of objects is needed, given an object; write [{"),
    "json text": ("x.json", b'"rows"', "given a text"),
    "json deeply nested": ("x.json", b"[" * 100_000, ": not JSON that can be read: "),
    "json not UTF-8": (
        "x.json",
        b'[\n{"instruction": "caf\xe9"}]',
        ", line 2: not UTF-8: byte 0xe9 at offset 22; save it as UTF-8",
    ),
    "json rows that are texts": (
        "x.json",
        b'["a", "b"]',
        ", row 0 (counting from 0): a text where an object is needed; none of its 2",
    ),
    "json one row a number": (
        "x.json",
        b'[{"instruction": "a", "response": "b"}, 7]',
        ", row 1 (counting from 0): a number where an object is needed; mend it",
    ),
    "empty json": ("x.json", b"", ": it holds no rows; at least one is needed"),
    "blank json": ("x.json", b" \n", ": it holds no rows"),
    "json empty array": ("x.json", b"[]", ": it holds no rows"),
    "json empty data": ("x.json", b'{"data": []}', ": it holds no rows"),
    "json rows without fields": ("x.json", b"[{}, {}]", ", its rows have no columns; none of its 2 rows"),
    "empty jsonl": ("x.jsonl", b"", ": it holds no rows"),
    "blank jsonl": ("x.jsonl", b"\n \n\n", ": it holds no rows"),
    "jsonl of a BOM": ("x.jsonl", b"\xef\xbb\xbf", ": it holds no rows"),
    "empty csv": ("x.csv", b"", ": it holds no rows"),
    "csv header alone": ("x.csv", b"instruction,response\n", ": it holds no rows"),
    "csv too few values": ("x.csv", b"instruction,response\na,b\nc\n", ", line 3: 1 values for 2 columns; mend it"),
    "csv too many values": ("x.csv", b"instruction,response\na,b,c\n", ", line 2: 3 values for 2 columns"),
    "csv quote left open": ("x.csv", b'instruction,response\na,b\nc,"d\n', ", line 3: not CSV: unexpected end of data"),
    "csv text after a quote": ("x.csv", b'instruction,response\n"a"x,b\nc,d\n', ", line 2: not CSV: "),
    "csv column twice": ("x.csv", b"response,response\na,b\n", ", line 1: column 'response' is named twice"),
    "csv with semicolons": (
        "x.csv",
        b"instruction;response\na;b\n",
        "no column 'instruction', 'response'; found: instruction;response",
    ),
    "csv not UTF-8": ("x.csv", b"instruction,response\na,caf\xe9\n", ", line 2: not UTF-8: byte 0xe9 at offset 26"),
    "parquet that is none": ("x.parquet", b"PAR2 nothing of the kind", ": not a Parquet file that can be read: "),
    "empty parquet": ("x.parquet", b"", ": not a Parquet file that can be read: "),
    "unknown ending": (
        "x.txt",
        b"a",
        ": files ending in '.txt' are not read; save the rows as .json, .jsonl, .csv or .parquet",
    ),
    "spreadsheet": ("x.xlsx", b"a", ": files ending in '.xlsx' are not read"),
    "compressed": ("x.jsonl.gz", b"a", ": files ending in '.gz' are not read"),
    "no ending": ("rows", b"a", ": files ending in 'nothing' are not read"),
}


@pytest.mark.parametrize("case", FILE_CASES)
def test_bad_file(tmp_path, case):
    name, content, expected = FILE_CASES[case]
    path = tmp_path / name
    path.write_bytes(content)
    message = message_of(path)
    assert message.startswith(str(path))
    assert expected in message


def test_row_that_spans_lines_of_csv_is_named_by_its_first(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('instruction,response\n"a\nb\nc",d\ne\n')
    assert ", line 5: 1 values for 2 columns" in message_of(path)


def test_missing_file(tmp_path):
    assert message_of(tmp_path / "none.jsonl") == f"{tmp_path}/none.jsonl: no such file; check data.source"
    assert "none.json: no such file" in message_of(tmp_path / "nowhere" / "none.json")


def test_missing_file_with_a_name_like_it_beside(tmp_path, write_rows):
    write_rows(tmp_path / "emails.jsonl", GOOD)
    assert message_of(tmp_path / "email.jsonl").endswith(f"no such file; did you mean {tmp_path}/emails.jsonl?")


def test_missing_file_with_an_ending_that_is_not_read(tmp_path):
    assert "files ending in '.txt' are not read (and no such file exists)" in message_of(tmp_path / "x.txt")


def test_directory(tmp_path, write_rows):
    assert "this is a directory; name a .json, .jsonl, .csv or .parquet file" in message_of(tmp_path)
    write_rows(tmp_path / "a.jsonl", GOOD)
    assert message_of(tmp_path).endswith("this is a directory; name a file in it: a.jsonl")


def test_directory_named_like_a_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    assert "this is a directory" in message_of(tmp_path / "rows.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(tmp_path, write_rows):
    path = write_rows(tmp_path / "rows.jsonl", GOOD)
    path.chmod(0)
    assert "it cannot be read: Permission denied; check its permissions" in message_of(path)


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl", "~nobody-of-that-name/x.csv", "loop.json"])
def test_impossible_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.json").symlink_to("loop.json")
    assert "no such file" in message_of(name)


VALUES = {
    "null": (None, "field 'response' is null, and text is needed"),
    "number": (7, "field 'response' is a number (7), and text is needed"),
    "fraction": (0.5, "field 'response' is a number (0.5)"),
    "boolean": (True, "field 'response' is true or false (True)"),
    "list": (["a"], "field 'response' is a list (['a'])"),
    "object": ({"text": "a"}, "field 'response' is an object ("),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("place", [0, 2])
def test_value_that_is_not_text(tmp_path, write_rows, ending, value, place):
    given, expected = VALUES[value]
    rows = [dict(row) for row in GOOD]
    rows[place]["response"] = given
    path = write_rows(tmp_path / f"x.{ending}", rows)
    where = f"line {place + 1}" if ending == "jsonl" else f"row {place} (counting from 0)"
    assert f", {where}: {expected}" in message_of(path)
    kept = load(path, on_bad_row="skip")
    assert kept.row_ids == [index for index in range(4) if index != place]
    assert [(row.index, expected in row.reason) for row in kept.skipped] == [(place, True)]


@pytest.mark.parametrize(("given", "expected"), [(None, "is null"), (b"a", "of type bytes (b'a')")])
def test_parquet_value_that_is_not_text(tmp_path, write_rows, given, expected):
    rows = [{"instruction": "a", "response": given}, {"instruction": "a", "response": given}]
    rows[1]["response"] = "text" if given is None else given
    path = write_rows(tmp_path / "x.parquet", rows)
    assert f"row 0 (counting from 0): field 'response' {'is ' if given else ''}{expected}" in message_of(path)


def test_parquet_column_of_numbers(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.parquet", [{"instruction": "a", "response": 1}])
    assert "field 'response' is a number (1), and text is needed" in message_of(path)
    assert "none of its 1 rows can be used; the first: field 'response' is a number" in message_of(
        path, on_bad_row="skip"
    )


def test_optional_field_that_is_not_text(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b", "input": 3}])
    message = message_of(path, required=("instruction", "output"), optional=("input",))
    assert ", line 1: field 'input' is a number (3), and text is needed" in message


BLANK = {
    "response": ({"response": " \n"}, [("response",)], "field 'response' is blank, and text is needed"),
    "one of two may be": ({"response": ""}, [("instruction", "response")], None),
    "both": (
        {"instruction": "", "response": "\t"},
        [("instruction", "response")],
        "fields 'instruction' and 'response' are blank, and text is needed",
    ),
    "not asked for": ({"response": ""}, [("instruction",)], None),
}


@pytest.mark.parametrize("case", BLANK)
@pytest.mark.parametrize("ending", FORMATS)
def test_blank_text(tmp_path, write_rows, ending, case):
    blank, texts, reason = BLANK[case]
    path = write_rows(tmp_path / f"x.{ending}", [GOOD[0], GOOD[1] | blank, GOOD[2]])
    if reason is None:
        assert load(path, texts=texts).row_ids == [0, 1, 2]
        return
    assert f": {reason}; mend it, or set data.on_bad_row=skip" in message_of(path, texts=texts)
    kept = load(path, texts=texts, on_bad_row="skip")
    assert (kept.row_ids, [(row.index, row.reason) for row in kept.skipped]) == ([0, 2], [(1, reason)])


def test_row_without_a_field_that_others_have(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [GOOD[0], {"instruction": "a"}, GOOD[2]])
    assert ", line 2: no field 'response'; it has instruction; mend it" in message_of(path)
    kept = load(path, on_bad_row="skip")
    assert kept.row_ids == [0, 2]
    assert [row.reason for row in kept.skipped] == ["no field 'response'; it has instruction"]


@pytest.mark.parametrize("case", [name for name, case in FILE_CASES.items() if case[0].endswith((".jsonl", ".csv"))])
def test_bad_lines_are_skipped_and_counted(tmp_path, case):
    name, content, _ = FILE_CASES[case]
    path = tmp_path / name
    path.write_bytes(content)
    rows = rows_or_message(path, on_bad_row="skip")
    if isinstance(rows, str):
        assert "\n" not in rows
        return
    assert len(rows.rows) + len(rows.skipped) == max(rows.row_ids + [row.index for row in rows.skipped]) + 1
    assert rows.skipped
    assert all(row.reason for row in rows.skipped)


def test_skipping_leaves_the_good_rows_with_their_own_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps(GOOD[0]).encode()
    path.write_bytes(b"\n".join([b"{", good, b"\xff\xfe", b"[]", good, b'{"instruction": 3}', good]))
    rows = load(path, on_bad_row="skip")
    assert rows.row_ids == [1, 4, 6]
    assert [row.index for row in rows.skipped] == [0, 2, 3, 5]


def test_csv_reading_goes_on_after_a_bad_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('instruction,response\n"a"x,b\nc,d\ne\nf,g\n')
    rows = load(path, on_bad_row="skip")
    assert [row["response"] for row in rows.rows] == ["d", "g"]
    assert len(rows.skipped) == 2


def test_no_row_left(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "a", "response": 1}] * 3)
    message = message_of(path, on_bad_row="skip")
    assert (
        message
        == f"{path}: none of its 3 rows can be used; the first: field 'response' is a number (1), and text is needed"
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_damaged_files_never_end_in_anything_but_an_input_error(tmp_path, write_rows, ending):
    """200 damaged copies a format: bytes flipped, inserted, removed, the file cut short."""
    whole = write_rows(tmp_path / f"whole.{ending}", GOOD).read_bytes()
    path = tmp_path / f"x.{ending}"
    rng = np.random.default_rng([26, FORMATS.index(ending)])
    num_refused = 0
    for case in range(200):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, len(damaged)))
            if case % 4 == 0:
                damaged[at] ^= 1 << int(rng.integers(0, 8))
            elif case % 4 == 1:
                damaged[at:at] = rng.bytes(int(rng.integers(1, 5)))
            elif case % 4 == 2:
                del damaged[at : at + int(rng.integers(1, 10))]
            else:
                del damaged[max(1, at) :]
        path.write_bytes(damaged)
        for on_bad_row in ("error", "skip"):
            rows = rows_or_message(path, on_bad_row=on_bad_row)
            if isinstance(rows, str):
                assert "\n" not in rows
                assert rows.startswith(str(path))
                num_refused += 1
            else:
                assert all(isinstance(value, str) for row in rows.rows for value in row.values())
                assert not rows.skipped or on_bad_row == "skip"
    assert num_refused > 100
