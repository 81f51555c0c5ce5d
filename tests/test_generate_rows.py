"""`packloop generate`: which texts it takes, what it shows, and the rows that it writes."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import run_config, save_base, save_run

from packloop import cli
from packloop.data.prompts import get_template
from packloop.engine import generate_rows
from packloop.engine.finished_run import open_run
from packloop.engine.generate_rows import generate_command, template_fields
from packloop.engine.sampling import Sampling
from packloop.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    data = {"source": str(write_rows(directory / "rows.jsonl", 20)), "eval_split": 5}
    return save_run(run_config(base, directory / "run", data=data))


def write_rows(path: Path, count: int) -> Path:
    rows = [{"instruction": f"note {n}", "response": f"the tap {n} leaks"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("instruction_from_response", ("response", ("response",), ("instruction",))),
        ("alpaca", ("instruction", ("instruction", "input"), ("output",))),
        ("dolly", ("instruction", ("instruction", "context"), ("response",))),
    ],
)
def test_the_prompts_own_fields_are_found(template, expected):
    fields = template_fields(get_template(template))
    assert fields.main == expected[0]
    assert sorted(fields.prompt) == sorted(expected[1])
    assert fields.response == expected[2]


def say(
    run_dir: Path, *, width: int = 120, terminal: bool = False, greedy: bool = False, **options
) -> tuple[list, str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    sampling = Sampling(max_new_tokens=5, greedy=greedy)
    return generate_command(run_dir, console=console, sampling=sampling, **options), out.getvalue()


def test_a_text_is_generated_for_and_shown(run_dir):
    results, shown = say(run_dir, text="the tap leaks", greedy=True)
    assert [result.row["response"] for result in results] == ["the tap leaks"]
    assert "[1] input\nthe tap leaks\n[1] generated\n" in shown
    assert "ground truth" not in shown


def test_held_out_rows_are_sampled_with_their_ground_truth(run_dir):
    from packloop.data.sources import load_rows, split_rows

    config = open_run(run_dir).config
    options = {"columns": {}, "required": ("instruction", "response"), "on_bad_row": "error"}
    rows = load_rows(config.data.source, split="train", **options)
    held_out = [row["response"] for row in split_rows(rows, 5, config.train.seed)[1].rows]
    results, shown = say(run_dir, sample=3)
    assert len({result.row["response"] for result in results}) == 3
    assert all(result.row["response"] in held_out for result in results)
    assert all(result.truth == result.row["instruction"] for result in results)
    assert "3 of 5 held-out rows" in shown
    assert f"[1] ground truth\n{results[0].truth}" in shown
    assert len(say(run_dir, sample=100)[0]) == 5


def test_training_rows_are_sampled_and_said_to_be_where_none_are_held_out(base, tmp_path):
    data = {"source": str(write_rows(tmp_path / "rows.jsonl", 4))}
    results, shown = say(save_run(run_config(base, tmp_path / "run", data=data)), sample=2)
    assert len(results) == 2
    assert "2 of 4 training rows, which the model has seen: data.eval_split=0" in shown


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_file_of_ones_own_becomes_an_instruction_data_set(run_dir, tmp_path, ending):
    bodies = ["the tap, leaks", 'she said "hello"\nand left', "ünïcode \u2028 text"]
    # Which texts a model without training stops at hangs on the processor's last bits: of so many, some and not all.
    bodies += [letter * count for letter in "xyz" for count in range(1, 33)]
    file = tmp_path / f"mails.{ending}"
    rows = [{"id": str(n), "body": body} for n, body in enumerate(bodies)]
    if ending == "json":
        file.write_text(json.dumps(rows))
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "body"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    output = tmp_path / "new.jsonl"
    results, shown = say(run_dir, file=str(file), field="body", output=output, greedy=True)
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    assert [result.row["response"] for result in results] == bodies
    # A text for which the model stopped at once has no instruction to learn from.
    kept = [result for result in results if result.generated]
    assert 0 < len(kept) < len(results)
    assert written == [{"instruction": r.generated, "response": r.row["response"]} for r in kept]
    assert f"{len(kept)} rows written to" in shown
    assert f"{len(results) - len(kept)} for which the model wrote nothing are left out" in shown
    # What was written is what training reads.
    from packloop.data.sources import load_rows

    options = {"columns": {}, "required": ("instruction", "response"), "on_bad_row": "error"}
    assert load_rows(str(output), split="train", **options).rows == written
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, "new.jsonl"])


def test_other_templates_write_the_rows_instruction_and_the_generated_response(base, tmp_path):
    data = {"source": str(write_rows(tmp_path / "rows.jsonl", 4)), "template": "dolly"}
    run_dir = save_run(run_config(base, tmp_path / "run", data=data))
    file = tmp_path / "ask.jsonl"
    rows = [{"instruction": "Who came?", "context": "Sam came."}, {"instruction": "Say hello", "context": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, _ = say(run_dir, file=str(file), output=tmp_path / "new.jsonl", greedy=True)
    written = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert written == [
        {"instruction": "Who came?\n\nSam came.", "response": results[0].generated},
        {"instruction": "Say hello", "response": results[1].generated},
    ]


def test_columns_of_the_training_data_are_used_for_a_file_and_its_other_columns_may_be_missing(base, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"body": "the tap leaks", "task": "a note"}\n{"body": "hello", "task": "a greeting"}\n')
    data = {"source": str(source), "columns": {"response": "body", "instruction": "task"}}
    run_dir = save_run(run_config(base, tmp_path / "run", data=data))
    results, _ = say(run_dir, file=str(source))
    assert [result.truth for result in results] == ["a note", "a greeting"]
    mails = tmp_path / "mails.jsonl"
    mails.write_text('{"body": "the oven is cold"}\n')
    results, _ = say(run_dir, file=str(mails))
    assert [(result.row["response"], result.truth) for result in results] == [("the oven is cold", None)]


def test_a_wide_terminal_shows_columns_and_what_a_text_holds_cannot_steer_it(run_dir):
    text = "the \x1b[31mtap\x07 [bold]leaks[/bold]"
    _, wide = say(run_dir, text=text, greedy=True, terminal=True, width=140)
    assert "┃ input" in wide
    assert "[bold]leaks[/bold]" in wide
    assert "\x1b[31m" not in wide
    assert "\x07" not in wide
    _, narrow = say(run_dir, text=text, greedy=True, terminal=True, width=60)
    assert "[1] input" in narrow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of --text, --file and --sample is needed, given none"),
        ({"text": "a", "sample": 1}, "given --text and --sample"),
        ({"text": "a", "field": "body"}, "--field body names a column of --file"),
        ({"text": " "}, "--text is empty"),
        ({"sample": 0}, "--sample 0: at least 1"),
        ({"sample": 1, "output": "new.csv"}, "a .jsonl file is written"),
        ({"sample": 1, "output": "no/such/dir/new.jsonl"}, "there is no directory 'no/such/dir'"),
        ({"file": "mails.docx"}, r"--file mails\.docx: a \.json, \.jsonl, \.csv, \.parquet file is needed"),
        ({"file": "bundled"}, r"--file bundled: a \.json"),
        ({"file": "missing.jsonl"}, r"^missing\.jsonl: no such file; check --file$"),
    ],
)
def test_bad_arguments_are_one_line_with_the_remedy(run_dir, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        generate_command(run_dir, console=Console(file=io.StringIO()), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: at least 1"),
        ({"seed": -1}, "--seed -1: at least 0"),
        ({"temperature": 0.0}, "--temperature 0.0: a number above 0 is needed; --greedy takes the likeliest token"),
        ({"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_sampling_out_of_bounds(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_the_command_line_s_defaults_are_those_of_sampling(monkeypatch):
    given = {}
    monkeypatch.setattr(generate_rows, "generate_command", lambda run, **options: given.update(options))
    cli.app(["generate", "RUN"], standalone_mode=False)
    assert given["sampling"] == Sampling()


def test_an_existing_file_is_never_overwritten(run_dir, tmp_path):
    output = tmp_path / "new.jsonl"
    output.write_text("mine\n")
    with pytest.raises(InputError, match="exists and is not overwritten; name another file"):
        say(run_dir, text="a", output=output)
    assert output.read_text() == "mine\n"


def test_a_missing_column_names_those_that_are_there(run_dir, tmp_path):
    file = tmp_path / "mails.jsonl"
    file.write_text('{"text_body": "hello"}\n')
    message = f"--file {file}: no column response; it has text_body; say with --field which one holds the texts"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        say(run_dir, file=str(file))
    message = f"--field body: no such column in {file}; it has text_body; nearest: text_body"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        say(run_dir, file=str(file), field="body")


def test_rows_that_cannot_be_used_are_left_out_and_counted(run_dir, tmp_path):
    bodies = ["the tap leaks", None, 3, "", " \n", "hello", None, None]
    file, output = tmp_path / "mails.jsonl", tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"body": body}) + "\n" for body in bodies))
    results, shown = say(run_dir, file=str(file), field="body", output=output, greedy=True)
    assert [result.row["response"] for result in results] == ["the tap leaks", "hello"]
    assert "row 1 (counting from 0) is left out: field 'body' is null, and text is needed\n" in shown
    assert "row 3 (counting from 0) is left out: field 'body' is blank, and text is needed\n" in shown
    assert "and so is 1 more of 8 rows\n" in shown
    assert "; 6 of the file that cannot be used are left out\n" in shown
    assert all(json.loads(line)["response"].strip() for line in output.read_text().splitlines())


def test_an_empty_csv_row_is_no_text(run_dir, tmp_path):
    file = tmp_path / "mails.csv"
    file.write_text('body\nhello\n""\n')
    results, _ = say(run_dir, file=str(file), field="body")
    assert [result.row["response"] for result in results] == ["hello"]
    file.write_text('body\n""\n')
    with pytest.raises(InputError, match="none of its 1 rows can be used; the first: field 'body' is blank") as caught:
        say(run_dir, file=str(file), field="body")
    assert caught.value.exit_code == 1
    assert "data." not in str(caught.value)
