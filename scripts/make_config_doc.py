"""Writes docs/configuration.md from the configuration's JSON Schema: `python scripts/make_config_doc.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packloop.config import RunConfig

PATH = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Made by `python scripts/make_config_doc.py` from packloop/config.py; a test compares the two. -->

A run is one YAML file of seven sections. Every setting has a default, so a file names only what differs:

```yaml
data: {source: rows.jsonl, packing: bfd}
train: {output_dir: runs/mine, max_steps: 200}
```

`packloop train FILE section.key=value ...` replaces single settings; a value is read as YAML, so
`data.columns={response: body}` works when it is quoted for the shell. `packloop validate FILE` checks a file and prints
it with every default filled in, `packloop schema` prints the JSON Schema that this page is made from.

An unknown key, a wrong type and settings that contradict each other are refused before anything is loaded, with exit
code 2 and a line for each fault: the key, the value, what is allowed and the nearest valid key. Types are not coerced:
`train.max_steps=1.5` is an error, not 1.

What `auto` chooses is written to `config.resolved.yaml` in the run's directory, and a resumed run keeps it.
"""


def render() -> str:
    schema = RunConfig.model_json_schema()
    parts = [INTRODUCTION]
    for name, reference in schema["properties"].items():
        section = _resolve(reference, schema)
        parts += [f"## {name}", section["description"], _table(name, section, schema)]
    template = schema["$defs"]["CustomTemplate"]
    parts += ["## A template of one's own", template["description"], _table("data.template", template, schema)]
    parts.append('For example `data: {template: {prompt: "Q: {question}\\nA: ", response: "{answer}"}}`.')
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _table(prefix: str, section: dict, schema: dict) -> str:
    lines = ["| setting | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    for key, setting in section["properties"].items():
        default = f"`{_yaml(setting['default'])}`" if "default" in setting else _default_of_factory(prefix, key)
        cells = (f"`{prefix}.{key}`", _allowed(setting, schema), default, setting["description"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default_of_factory(prefix: str, key: str) -> str:
    """The schema leaves out defaults that are made anew each time: empty lists and dictionaries."""
    section = RunConfig.model_fields.get(prefix)
    return f"`{_yaml(getattr(section.default, key))}`" if section else "required"


def _yaml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _resolve(setting: dict, schema: dict) -> dict:
    return schema["$defs"][setting["$ref"].rpartition("/")[2]] if "$ref" in setting else setting


def _allowed(setting: dict, schema: dict) -> str:
    if "anyOf" in setting:
        return " or ".join(_allowed(choice, schema) for choice in setting["anyOf"])
    if "$ref" in setting:
        return "a template of one's own"
    if "enum" in setting:
        return ", ".join(f"`{choice}`" for choice in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    if setting["type"] == "array":
        return f"list of {_allowed(setting['items'], schema)}"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "names of columns",
    }
    return names[setting["type"]] + _bounds(setting)


def _bounds(setting: dict) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {setting[name]:g}" for name, sign in signs.items() if name in setting]
    return f" {', '.join(bounds)}" if bounds else ""


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
    print(f"wrote {PATH}")
