"""`packloop generate`: texts or rows in, what the model writes for each out, on the console and as a new data set."""

from __future__ import annotations

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
from packloop.data.files import EXTENSIONS
from packloop.data.prompts import Template, get_template
from packloop.data.sources import Rows, load_rows, load_train_and_eval
from packloop.engine.finished_run import open_run
from packloop.errors import InputError

# Narrower than this, three columns of text are harder to read than one below the other.
_COLUMNS_WIDTH = 100


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
    max_new_tokens: int = 100,
    greedy: bool = False,
    temperature: float = 0.9,
    top_p: float = 0.9,
    batch_size: int = 8,
    seed: int = 0,
    output: str | Path | None = None,
    console: Console | None = None,
) -> list[Generation]:
    """Generates for `text`, for the rows of `file` or for `sample` held-out rows, prints each and returns them.

    file: json, jsonl, csv or parquet; `field` names its column for the template's main prompt field. sample: rows of
    the run's held-out part, or of its training rows, saying so, where it has none; drawn by `seed`. output: a .jsonl
    file of {"instruction", "response"} objects that training takes as input; written whole or not at all, never over an
    existing file. Raises InputError (all of it before the model is loaded, but for prompts that are too long).
    """
    console = console or Console()
    _check_arguments(text, file, field, sample, temperature, top_p, batch_size, max_new_tokens)
    target = _check_output(output)
    config = open_run(run_dir).config
    template = get_template(config.data.template)
    fields = template_fields(template)
    if text is not None:
        rows = _row_of_text(text, fields, template)
    elif file is not None:
        rows = _rows_of_file(str(file), field, config.data, template, fields)
    else:
        rows, note = _sampled_rows(config.data, config.train.seed, template, sample, seed)
        console.print(Text(note), soft_wrap=True)
    for skipped in rows.skipped:
        console.print(Text(f"row {skipped.index} is left out: {skipped.reason}"), soft_wrap=True)

    from packloop.engine.generate import generate_texts, load_run  # torch: only once the arguments are known to be good

    _, model, tokenizer = load_run(run_dir)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("generating", total=len(rows))
        generated = generate_texts(
            model,
            tokenizer,
            [template.render_prompt(row) for row in rows.rows],
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            seed=seed,
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
        console.print(Text(f"{num_written} rows written to {output}{left_out}"), soft_wrap=True)
    return results


def template_fields(template: Template) -> TemplateFields:
    """Found by rendering: a field belongs to the text that asks for it."""
    asked: list[str] = []

    class Recorder(dict):
        def __getitem__(self, key):
            asked.append(key)
            return "text"

        def get(self, key, default=None):
            return self[key]

    found = []
    for render in (template.render_prompt, template.render_response):
        asked.clear()
        render(Recorder())
        found.append(tuple(name for name in (*template.fields, *template.optional_fields) if name in asked))
    prompt, response = found
    if not set(prompt) & set(template.fields):
        raise InputError(f"data.template={template.name}: its prompt names no column, so there is nothing to give it")
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


def _check_arguments(text, file, field, sample, temperature, top_p, batch_size, max_new_tokens) -> None:
    given = [name for name, value in (("--text", text), ("--file", file), ("--sample", sample)) if value is not None]
    if len(given) != 1:
        raise InputError(f"one of --text, --file and --sample is needed, given {' and '.join(given) or 'none'}")
    if file is not None and Path(file).suffix.lower() not in EXTENSIONS:
        raise InputError(f"--file {file}: a {', '.join(EXTENSIONS)} file is needed; save the rows as one of these")
    if field is not None and file is None:
        raise InputError(f"--field {field} names a column of --file, which is not given")
    for name, value, low in (
        ("--sample", sample, 1),
        ("--batch-size", batch_size, 1),
        ("--max-new-tokens", max_new_tokens, 1),
    ):
        if value is not None and value < low:
            raise InputError(f"{name} {value}: at least {low} is needed")
    if not temperature > 0:
        raise InputError(f"--temperature {temperature}: a number above 0 is needed; --greedy takes the likeliest token")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: a number above 0, at most 1, is needed")


def _check_output(output: str | Path | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".jsonl":
        raise InputError(f"--output {output}: a .jsonl file is written; name one")
    if path.exists():
        raise InputError(f"--output {output} exists and is not overwritten; name another file or remove it")
    if not path.parent.is_dir():
        raise InputError(f"--output {output}: there is no directory {str(path.parent)!r}; make it or name another file")
    return path


def _row_of_text(text: str, fields: TemplateFields, template: Template) -> Rows:
    others = [name for name in fields.prompt if name != fields.main and name in template.fields]
    if others:
        raise InputError(
            f"--text fills one field, and the run's prompt needs {fields.main}, {', '.join(others)}; "
            "give a --file with those"
        )
    if not text.strip():
        raise InputError("--text is empty; give the text to generate for")
    empty = dict.fromkeys(fields.prompt, "")
    return Rows(rows=[{**empty, fields.main: text}], row_ids=[0])


def _rows_of_file(file: str, field: str | None, data: DataConfig, template: Template, fields: TemplateFields) -> Rows:
    """Rows of a file of the user's own: the prompt's fields are needed, the response's are the truth where they are."""
    required = [name for name in fields.prompt if name in template.fields]
    optional = [name for name in (*fields.prompt, *fields.response) if name not in required]
    optional = list(dict.fromkeys(optional))
    mapped = {name: column for name, column in data.columns.items() if name in required}
    if field is not None:
        mapped[fields.main] = field
    mapped_optional = {name: column for name, column in data.columns.items() if name in optional}
    options = {"required": required, "on_bad_row": data.on_bad_row}
    if mapped_optional:
        try:
            return load_rows(file, columns={**mapped, **mapped_optional}, optional=optional, **options)
        except InputError:
            pass  # the training data's other columns need not be in this file
    try:
        return load_rows(file, columns=mapped, optional=optional, **options)
    except InputError as error:
        raise InputError(f"{error} (--field names the column that is {fields.main})") from None


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
