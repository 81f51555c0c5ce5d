"""A row to two texts: the prompt that the model is given and the response that it learns to write."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from packloop.errors import ConfigError

Row = Mapping[str, str]


@dataclass(frozen=True)
class Template:
    """How a row becomes text. `fields` must be in every row; `optional_fields` may be missing or empty."""

    name: str
    fields: tuple[str, ...]
    render_prompt: Callable[[Row], str]
    render_response: Callable[[Row], str]
    optional_fields: tuple[str, ...] = ()


class FormatStrings(Protocol):
    """A template of the user's own, as `packloop.config.CustomTemplate` holds it."""

    prompt: str
    response: str


def get_template(value: str | FormatStrings) -> Template:
    """The template of that name, or one made of the format strings `value.prompt` and `value.response`.

    Raises `ConfigError` for an unknown name, or a format string that is more than text and `{field}`s.
    """
    if isinstance(value, str):
        if value not in _TEMPLATES:
            raise ConfigError(
                f"data.template={value!r}: no such template; allowed: {', '.join(_TEMPLATES)}, or your own"
            )
        return _TEMPLATES[value]
    prompt = _parse_format(value.prompt, "data.template.prompt")
    response = _parse_format(value.response, "data.template.response")
    if not any(field for _, field in response):
        raise ConfigError(
            f"data.template.response={value.response!r}: it names no column, so every row would teach the same text; "
            "name one, for example '{answer}'"
        )
    fields = dict.fromkeys(field for _, field in [*prompt, *response] if field)
    return Template(
        name="custom",
        fields=tuple(fields),
        render_prompt=lambda row: _fill(prompt, row),
        render_response=lambda row: _fill(response, row),
    )


def fields_used(template: Template) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fields that the prompt is made of, fields that the response is made of), each in the template's order."""
    asked: set[str] = set()

    class Recorder(dict):
        def __getitem__(self, key):
            asked.add(key)
            return "text"

        def get(self, key, default=None):
            return self[key]

    found = []
    for render in (template.render_prompt, template.render_response):
        asked.clear()
        render(Recorder())  # a field belongs to the text that asks for it
        found.append(tuple(name for name in (*template.fields, *template.optional_fields) if name in asked))
    return found[0], found[1]


def needed_texts(template: Template, loss_on: Literal["all", "response"]) -> list[tuple[str, ...]]:
    """Groups of fields, of each of which a row must fill one: those of its prompt, and what alone is to be learnt.

    A prompt that names no field, for texts to be learnt without one, needs none.
    """
    prompt, response = fields_used(template)
    return [group for group in (prompt, response if loss_on == "response" else ()) if group]


def _parse_format(text: str, setting: str) -> list[tuple[str, str | None]]:
    """`text` as (literal, field that follows it or None) pairs."""
    braces = "write {{ or }} for a brace that is text"
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{setting}={text!r}: {error}; {braces}") from None
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        shown = "{" + field + ("!" + conversion if conversion else "") + (":" + spec if spec else "") + "}"
        if not field.strip() or field.isdigit():
            raise ConfigError(f"{setting}={text!r}: {shown} names no column; write {{column}}, and {braces}")
        if spec or conversion or any(sign in field for sign in ".[]"):
            raise ConfigError(
                f"{setting}={text!r}: {shown} is more than a column's name; write {{column}} (data.columns renames a "
                f"column whose name has such signs), and {braces}"
            )
    return [(literal, field) for literal, field, _, _ in parts]


def _fill(parts: list[tuple[str, str | None]], row: Row) -> str:
    # Joined by hand: str.format would read the braces that a row's own text may hold.
    return "".join(literal + (row[field] if field else "") for literal, field in parts)


def _instruction_from_response_prompt(row: Row) -> str:
    return (
        "### Instruction:\n"
        "Use the Input below to create an instruction, "
        "which could have been used to generate the input using an LLM.\n\n"
        f"### Input:\n{row['response']}\n\n"
        "### Response:\n"
    )


def _alpaca_prompt(row: Row) -> str:
    # Models tuned on Alpaca's data have seen these two wordings; a prompt that differs in a word is a different prompt.
    request = "Write a response that appropriately completes the request.\n\n"
    instruction = f"### Instruction:\n{row['instruction']}\n\n"
    if row.get("input", "").strip():
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            f"{request}{instruction}### Input:\n{row['input']}\n\n### Response:\n"
        )
    return f"Below is an instruction that describes a task. {request}{instruction}### Response:\n"


def _dolly_prompt(row: Row) -> str:
    context = f"### Context:\n{row['context']}\n\n" if row.get("context", "").strip() else ""
    return f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"


_TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="instruction_from_response",
            fields=("instruction", "response"),
            render_prompt=_instruction_from_response_prompt,
            render_response=lambda row: row["instruction"] + "\n",
        ),
        Template(
            name="alpaca",
            fields=("instruction", "output"),
            optional_fields=("input",),
            render_prompt=_alpaca_prompt,
            render_response=lambda row: row["output"],
        ),
        Template(
            name="dolly",
            fields=("instruction", "response"),
            optional_fields=("context",),
            render_prompt=_dolly_prompt,
            render_response=lambda row: row["response"],
        ),
    )
}
