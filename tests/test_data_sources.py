"""Reading rows: each format, columns, splits, and which names go to the Hub."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from packloop.data import sources
from packloop.data.sources import load_rows, load_train_and_eval, split_rows
from packloop.errors import ConfigError, InputError

FIELDS = ("instruction", "response")
GOOD = [{"instruction": f"Write {n}.", "response": f"{n},\n“quoted” 漢"} for n in range(4)]
FORMATS = ["json", "jsonl", "csv", "parquet"]


def load(path, *, required=FIELDS, optional=(), columns=None, on_bad_row="error", **options):
    return load_rows(
        str(path), columns=columns or {}, required=required, optional=optional, on_bad_row=on_bad_row, **options
    )


def message_of(path, **options):
    """The error that loading gives: one line, exit code 1."""
    with pytest.raises(InputError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("ending", FORMATS)
def test_each_format_gives_the_same_rows(tmp_path, write_rows, ending):
    rows = load(write_rows(tmp_path / f"rows.{ending}", GOOD))
    assert rows.rows == GOOD
    assert rows.row_ids == [0, 1, 2, 3]
    assert rows.skipped == []


def test_endings_are_read_in_any_case(tmp_path, write_rows):
    path = write_rows(tmp_path / "rows.jsonl", GOOD).rename(tmp_path / "rows.JSONL")
    assert load(path).rows == GOOD


def test_json_with_rows_under_data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": GOOD}))
    assert load(path).rows == GOOD


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_byte_order_mark_is_no_part_of_the_text(tmp_path, write_rows, ending):
    path = write_rows(tmp_path / f"rows.{ending}", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).rows == GOOD


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_windows_line_endings(tmp_path, write_rows, ending):
    path = write_rows(tmp_path / f"rows.{ending}", [{"instruction": "a", "response": "b"}] * 2)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert load(path).rows == [{"instruction": "a", "response": "b"}] * 2


def test_blank_lines_of_jsonl_are_not_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(GOOD[0]) + "\n  \n" + json.dumps(GOOD[1]))
    assert load(path).rows == GOOD[:2]
    assert load(path).row_ids == [0, 1]


def test_csv_cell_longer_than_the_csv_modules_limit(tmp_path, write_rows):
    limit = csv.field_size_limit()
    rows = [{"instruction": "x" * 200_000, "response": "y"}]
    assert load(write_rows(tmp_path / "rows.csv", rows)).rows == rows
    assert csv.field_size_limit() == limit


def test_parquet_in_a_directory_that_looks_like_a_partition(tmp_path, write_rows):
    directory = tmp_path / "response=wrong"
    directory.mkdir()
    assert load(write_rows(directory / "rows.parquet", GOOD)).rows == GOOD


def test_columns_rename_and_leave_the_rest_out(tmp_path, write_rows):
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "Hello", "instruction": "Greet.", "id": 7}])
    assert load(path, columns={"response": "body"}).rows == [{"instruction": "Greet.", "response": "Hello"}]


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_optional_field_may_be_missing_or_empty(tmp_path, write_rows, row):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b", **row}])
    (read,) = load(path, required=("instruction", "output"), optional=("input",)).rows
    assert read == {"instruction": "a", "input": "", "output": "b"}


def test_bundled_split_that_does_not_exist():
    message = message_of("bundled", split="validation")
    assert message == "bundled: it has no split 'validation'; its splits: train, heldout"


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_alpaca_columns_under_the_reversed_template(tmp_path, write_rows, ending, on_bad_row):
    path = write_rows(tmp_path / f"x.{ending}", [{"instruction": "a", "input": "", "output": "b"}] * 2)
    assert message_of(path, on_bad_row=on_bad_row) == (
        f"{path}: no column 'response'; found: instruction, input, output; expected: instruction, response; "
        "say which column is meant with data.columns={response: output}, or choose another data.template"
    )
    assert load(path, columns={"response": "output"}).rows == [{"instruction": "a", "response": "b"}] * 2


def test_columns_that_nothing_resembles(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"x": "a", "y": "b"}])
    assert "data.columns={instruction: COLUMN}" in message_of(path)


def test_column_with_a_spelling_mistake(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "a", "Response": "b"}])
    assert "data.columns={response: Response}" in message_of(path)


def test_mapped_column_that_is_not_there(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", GOOD)
    message = message_of(path, columns={"response": "body"})
    assert "no column 'body'; found: instruction, response; expected: instruction, body" in message


def test_mapped_optional_column_that_is_not_there(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}])
    message = message_of(path, required=("instruction", "output"), optional=("input",), columns={"input": "inputs"})
    assert "no column 'inputs'" in message


def test_columns_key_that_is_no_field(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(
        ConfigError, match=r"data\.columns: 'respnse' is no field of the template; its fields: instruction,"
    ):
        load(path, columns={"respnse": "output"})


def rows_in(tmp_path, write_rows, count):
    return load(
        write_rows(tmp_path / "rows.jsonl", [{"instruction": str(n), "response": str(n)} for n in range(count)])
    )


@pytest.mark.parametrize(
    ("eval_split", "expected"), [(0, 0), (1, 1), (9, 9), (0.0, 0), (0.25, 2), (0.01, 1), (0.94, 9)]
)
def test_split_rows(tmp_path, write_rows, eval_split, expected):
    rows = rows_in(tmp_path, write_rows, 10)
    train, held_out = split_rows(rows, eval_split, seed=1)
    assert len(held_out) == expected
    assert train.row_ids == sorted(train.row_ids)
    assert sorted(train.row_ids + held_out.row_ids) == rows.row_ids
    assert [row["response"] for row in held_out.rows] == [str(row_id) for row_id in held_out.row_ids]
    assert split_rows(rows, eval_split, seed=1)[1].row_ids == held_out.row_ids


def test_split_depends_on_the_seed(tmp_path, write_rows):
    rows = rows_in(tmp_path, write_rows, 50)
    assert split_rows(rows, 10, seed=1)[1].row_ids != split_rows(rows, 10, seed=2)[1].row_ids


@pytest.mark.parametrize("eval_split", [10, 11, 0.96])
def test_split_that_leaves_nothing_to_train_on(tmp_path, write_rows, eval_split):
    with pytest.raises(InputError, match=r"data\.eval_split=.* of 10 rows and leaves none to train on"):
        split_rows(rows_in(tmp_path, write_rows, 10), eval_split, seed=1)


def train_and_eval(source, eval_split):
    return load_train_and_eval(
        str(source), split="train", eval_split=eval_split, seed=0, columns={}, required=FIELDS, on_bad_row="error"
    )


def test_load_train_and_eval(tmp_path, write_rows):
    path = write_rows(tmp_path / "rows.jsonl", GOOD)
    assert train_and_eval(path, 0)[1] is None
    train, held_out = train_and_eval(path, 1)
    assert (len(train), len(held_out)) == (3, 1)


def test_named_eval_split_of_a_file_is_refused(tmp_path, write_rows):
    with pytest.raises(InputError, match=r"data\.eval_split='test': .* is a file and has no splits; give a count"):
        train_and_eval(write_rows(tmp_path / "rows.jsonl", GOOD), "test")


def test_a_file_that_is_not_there_is_said_before_its_splits(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        train_and_eval(tmp_path / "none.jsonl", "test")


def test_eval_split_equal_to_the_training_split_is_refused():
    with pytest.raises(InputError, match="is the split that is trained on"):
        train_and_eval("bundled", "train")


@pytest.mark.parametrize("source", ["not a name", "a/b/c", "owner/na me", "owner/", "/", "x:y", "owner/name?x=1"])
def test_neither_file_nor_hub_name(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    assert "\n" not in message_of(source)


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_source(source):
    with pytest.raises(ConfigError, match=r"data\.source=.*: name a file, a data set on the Hub, or bundled"):
        load(source)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("databricks/databricks-dolly-15k", False),
        ("squad", False),
        ("owner/name.v2", False),
        ("rows.jsonl", True),
        ("owner/rows.csv", True),
        ("./rows", True),
        ("../rows", True),
        ("/data/rows", True),
        ("~/rows", True),
        ("here/rows", True),
        ("present", True),
        ("C:\\rows", True),
        ("rows.txt", True),
    ],
)
def test_what_looks_like_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch, source, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "present").touch()
    assert sources.is_local(source) is local


def test_hub_names(tmp_path, write_rows):
    """A data set as `datasets` loads it, a split that does not exist, and a name that cannot be reached."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_rows(tmp_path / "owner" / "name" / "train.jsonl", GOOD)
    code = """
from packloop.data.sources import _read_hub, load_rows
from packloop.errors import InputError
print([record.fields["instruction"] for record in _read_hub("owner/name", "train", None)])
for read in (
    lambda: _read_hub("owner/name", "test", None),
    lambda: load_rows("nobody/nothing", columns={}, required=["a"], on_bad_row="error"),
):
    try:
        read()
    except InputError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    rows, no_split, no_network = result.stdout.splitlines()
    assert rows == str([row["instruction"] for row in GOOD])
    assert no_split.startswith("Hub data set 'owner/name', split 'test', cannot be loaded: ")
    assert no_network.startswith("Hub data set 'nobody/nothing', split 'train', cannot be loaded: ")
    assert "the network" in no_network
