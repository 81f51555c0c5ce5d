"""`packloop generate`: texts or rows in, what the model writes for each out, on the console and as a new data set."""

from __future__ import annotations

import difflib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from packloop.config import DataConfig
from packloop.data.files import EXTENSIONS, row_place
from packloop.data.prompts import Template, fields_used, get_template, needed_texts
from packloop.data.sources import MissingColumns, Rows, load_rows, load_train_and_eval
from packloop.engine.finished_run import open_run
from packloop.engine.sampling import Sampling
from packloop.errors import ConfigError, InputError

# Narrower than this, three columns of text are harder to read than one below the other.
_COLUMNS_WIDTH = 100
# Rows left out of which each is listed; the others are counted.
_LISTED = 5


@dataclass(frozen=True)
class Generation:
    """One row with what the model wrote for it. `truth` is None where the source has none."""

    row: Mapping[str, str]
    generated: str
    truth: str | None


@dataclass(frozen=True)
class TemplateFields:
    """Which fields a template's prompt and response are made of. `main` is the one that a lone text goes into."""

    main: str
    prompt: tuple[str, ...]
    response: tuple[str, ...]


def generate_command(
    run_dir: str | Path,
    *,
    text: str | None = None,
    file: str | Path | None = None,
    field: str | None = None,
    sample: int | None = None,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    console: Console | None = None,
) -> list[Generation]:
    """Generates for `text`, for the rows of `file` or for `sample` held-out rows, prints each and returns them.

    file: json, jsonl, csv or parquet; `field` names its column for the template's main prompt field. sample: rows of
    the run's held-out part, or of its training rows, saying so, where it has none; drawn by the sampling's seed.
    output: a .jsonl file of {"instruction", "response"} objects that training takes as input; written whole or not at
    all, never over an existing file. Rows of `file` that cannot be used are left out and said to be. Raises InputError
    and ConfigError (all before the model is loaded, but for prompts that are too long).
    """
    console, sampling = console or Console(), sampling or Sampling()
    _check_arguments(text, file, field, sample)
    target = _check_output(output)
    config = open_run(run_dir).config
    template = get_template(config.data.template)
    fields = template_fields(template)
    if text is not None:
        rows = _row_of_text(text, fields, template)
    elif file is not None:
        rows = _rows_of_file(str(file), field, config.data, template, fields)
    else:
        rows, note = _sampled_rows(config.data, config.train.seed, template, sample, sampling.seed)
        console.print(Text(note), soft_wrap=True)
    for line in _left_out(rows):
        console.print(Text(line), soft_wrap=True)

    from packloop.engine.generate import generate_texts, load_run  # torch: only once the arguments are known to be good

    _, model, tokenizer = load_run(run_dir)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("generating", total=len(rows))
        generated = generate_texts(
            model,
            tokenizer,
            [template.render_prompt(row) for row in rows.rows],
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not sampling.greedy,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            batch_size=sampling.batch_size,
            seed=sampling.seed,
            on_batch=lambda count: progress.advance(task, count),
        )
    results = [
        Generation(row=row, generated=text, truth=_truth(row, template, fields))
        for row, text in zip(rows.rows, generated, strict=True)
    ]
    print_generations(results, fields, console)
    if target is not None:
        num_written = write_pairs(target, results, template, fields)
        empty = len(results) - num_written
        left_out = f"; {empty} for which the model wrote nothing are left out" if empty else ""
        left_out += f"; {len(rows.skipped)} of the file that cannot be used are left out" if rows.skipped else ""
        console.print(Text(f"{num_written} rows written to {output}{left_out}"), soft_wrap=True)
    return results


def template_fields(template: Template) -> TemplateFields:
    """The template's, by `fields_used`. ConfigError where the prompt names none that every row has."""
    prompt, response = fields_used(template)
    if not set(prompt) & set(template.fields):
        raise ConfigError(f"data.template={template.name}: its prompt names no column, so there is nothing to give it")
    return TemplateFields(main=prompt[0], prompt=prompt, response=response)


def print_generations(results: Sequence[Generation], fields: TemplateFields, console: Console) -> None:
    """Input, generated text and ground truth: side by side on a wide terminal, one below the other elsewhere."""
    has_truth = any(result.truth is not None for result in results)
    titles = ["input", "generated", "ground truth"][: 3 if has_truth else 2]
    if console.is_terminal and console.width >= _COLUMNS_WIDTH:
        table = Table(*titles, show_lines=True, expand=True)
        for column in table.columns:
            column.ratio = 1
        for result in results:
            table.add_row(*(Text(text) for text in _columns(result, fields)[: len(titles)]))
        console.print(table)
        return
    for number, result in enumerate(results, start=1):
        for title, text in zip(titles, _columns(result, fields)):
            console.print(Text(f"[{number}] {title}", style="bold"))
            console.print(Text(text), soft_wrap=True)
        console.print()


def write_pairs(path: Path, results: Sequence[Generation], template: Template, fields: TemplateFields) -> int:
    """Writes {"instruction", "response"} lines to a new file, whole or not at all, and returns how many.

    A template that asks for the instruction gives it as generated, with the row's text as the response; any other
    gives the row's instruction (its further input below it) and the generated response. Rows for which nothing was
    generated are left out: training would refuse them.
    """
    pairs = [_pair(result, fields) for result in results if result.generated]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for instruction, response in pairs:
                file.write(json.dumps({"instruction": instruction, "response": response}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written ({error}); give another --output") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(pairs)


def _pair(result: Generation, fields: TemplateFields) -> tuple[str, str]:
    given = "\n\n".join(result.row[name] for name in fields.prompt if result.row.get(name))
    if "instruction" in fields.response and "instruction" not in fields.prompt:
        return result.generated, given
    return given, result.generated


def _check_arguments(text, file, field, sample) -> None:
    given = [name for name, value in (("--text", text), ("--file", file), ("--sample", sample)) if value is not None]
    if len(given) != 1:
        raise ConfigError(f"one of --text, --file and --sample is needed, given {' and '.join(given) or 'none'}")
    if file is not None and Path(file).suffix.lower() not in EXTENSIONS:
        raise ConfigError(f"--file {file}: a {', '.join(EXTENSIONS)} file is needed; save the rows as one of these")
    if field is not None and file is None:
        raise ConfigError(f"--field {field} names a column of --file, which is not given")
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}: at least 1 is needed")


def _check_output(output: str | Path | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output {output}: a .jsonl file is written; name one")
    if path.exists():
        raise InputError(f"--output {output} exists and is not overwritten; name another file or remove it")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--output {output}: there is no directory {str(path.parent)!r}; make it or name another file"
        )
    return path


def _row_of_text(text: str, fields: TemplateFields, template: Template) -> Rows:
    others = [name for name in fields.prompt if name != fields.main and name in template.fields]
    if others:
        raise ConfigError(
            f"--text fills one field, and the run's prompt needs {fields.main}, {', '.join(others)}; "
            "give a --file with those"
        )
    if not text.strip():
        raise ConfigError("--text is empty; give the text to generate for")
    empty = dict.fromkeys(fields.prompt, "")
    return Rows(rows=[{**empty, fields.main: text}], row_ids=[0])


def _rows_of_file(file: str, field: str | None, data: DataConfig, template: Template, fields: TemplateFields) -> Rows:
    """Rows of a file of the user's own: the prompt's fields are needed, the response's are the truth where they are."""
    required = [name for name in fields.prompt if name in template.fields]
    optional = [name for name in dict.fromkeys((*fields.prompt, *fields.response)) if name not in required]
    columns = {name: column for name, column in data.columns.items() if name in (*required, *optional)}
    if field is not None:
        columns[fields.main] = field
    options = {"required": required, "optional": optional, "texts": [fields.prompt], "on_bad_row": "skip"}
    try:
        return load_rows(file, columns=columns, named="--file", **options)
    except MissingColumns as error:
        absent = error
    # The training data's other columns need not be in this file.
    left = {name: column for name, column in columns.items() if name in required or name not in absent.fields}
    if not set(absent.fields) & set(required):
        return load_rows(file, columns=left, named="--file", **options)
    has = f"it has {', '.join(absent.found)}"
    if fields.main not in absent.fields:
        missing = ", ".join(columns.get(name, name) for name in absent.fields if name in required)
        raise ConfigError(f"--file {file}: no column {missing}, which the run's prompt needs too; {has}; name one so")
    if field is not None:
        near = difflib.get_close_matches(field, absent.found, n=1)
        raise ConfigError(f"--field {field}: no such column in {file}; {has}{f'; nearest: {near[0]}' if near else ''}")
    column = columns.get(fields.main, fields.main)
    raise ConfigError(f"--file {file}: no column {column}; {has}; say with --field which one holds the texts")


def _left_out(rows: Rows) -> list[str]:
    """A line for each of the first rows of a file that cannot be used, and their number where there are more."""
    lines = [f"{row_place(row.index)} is left out: {row.reason}" for row in rows.skipped[:_LISTED]]
    if len(rows.skipped) > _LISTED:
        more = len(rows.skipped) - _LISTED
        lines.append(f"and so {'is' if more == 1 else 'are'} {more} more of {len(rows) + len(rows.skipped)} rows")
    return lines


def _sampled_rows(data: DataConfig, data_seed: int, template: Template, count: int, seed: int) -> tuple[Rows, str]:
    train, held_out = load_train_and_eval(
        data.source,
        split=data.split,
        eval_split=data.eval_split,
        seed=data_seed,
        revision=data.revision,
        columns=data.columns,
        required=template.fields,
        optional=template.optional_fields,
        texts=needed_texts(template, data.loss_on),  # as in training, or other rows would be held out
        on_bad_row=data.on_bad_row,
    )
    rows = train if held_out is None else held_out
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    note = f"{len(chosen)} of {len(rows)} held-out rows"
    if held_out is None:
        note = f"{len(chosen)} of {len(rows)} training rows, which the model has seen: data.eval_split=0 holds none out"
    return Rows(rows=[rows.rows[i] for i in chosen], row_ids=[rows.row_ids[i] for i in chosen]), note


def _truth(row: Mapping[str, str], template: Template, fields: TemplateFields) -> str | None:
    if not all(row.get(name) for name in fields.response):
        return None
    return template.render_response(row).strip()


def _columns(result: Generation, fields: TemplateFields) -> tuple[str, str, str]:
    given = "\n\n".join(result.row[name] for name in fields.prompt if result.row.get(name))
    return _printable(given), _printable(result.generated), _printable(result.truth or "")


def _printable(text: str) -> str:
    """Text without control characters: what a row or a model holds must not steer the terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
