"""What is wrong with a configuration, one line a fault: the key, the value, what is allowed, the nearest of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Longest value that a message repeats whole.
_SHOWN_LENGTH = 60


def describe_faults(error: ValidationError, values: Mapping[str, Any], root: type[BaseModel]) -> list[str]:
    """One line for each setting at fault in `values`, which were validated as `root`, a model made of sections.

    A setting of several possible types fails once for each of them; it is one fault all the same.
    """
    lines: dict[str, str] = {}
    faults = error.errors()
    for fault in faults:
        location = [str(part) for part in fault["loc"]]
        if fault["type"] == "value_error" and len(location) < 2:
            lines[str(fault["ctx"]["error"])] = str(fault["ctx"]["error"])
        elif len(location) < 2:
            name = location[0] if location else "the configuration"
            lines[name] = _section_fault(name, fault, root)
        else:
            section, key = location[:2]
            for name, line in _setting_faults(section, key, _at(values, section, key), faults, root).items():
                lines.setdefault(name, line)
    return list(lines.values())


def shown(value: Any) -> str:
    """A value as a message repeats it: null, true and false as in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "..."


def _section_fault(name: str, fault: dict, root: type[BaseModel]) -> str:
    given = fault["input"]
    if fault["type"] != "extra_forbidden":
        return f"{name}={shown(given)}: settings are needed, for example {name}.{_example(root, name)}"
    sections = list(root.model_fields)
    holders = [f"{section}.{name}" for section in sections if name in _fields(root, section)]
    if holders:
        return f"{name}={shown(given)}: no such section; it belongs at {' or '.join(holders)}"
    return f"{name}={shown(given)}: no such section; {_choice(name, sections)}"


def _setting_faults(
    section: str, key: str, given: Any, faults: Sequence[dict], root: type[BaseModel]
) -> dict[str, str]:
    """Dotted name -> line, for every fault of one setting."""
    name, fields = f"{section}.{key}", _fields(root, section)
    if key not in fields:
        # `train.checkpoint_every` means checkpoint.every.
        elsewhere = [
            f"{other}.{field}"
            for other in root.model_fields
            for field in _fields(root, other)
            if key in (field, f"{other}_{field}")
        ]
        hint = f"it belongs at {' or '.join(elsewhere)}" if elsewhere else _choice(key, list(fields), f"{section}.")
        return {name: f"{name}={shown(given)}: no such setting; {hint}"}
    annotation = _annotation(fields[key])
    nested = next((part for part in _members(annotation) if _is_model(part)), None)
    if nested is not None and isinstance(given, Mapping):
        mine = [fault for fault in faults if [str(part) for part in fault["loc"][:2]] == [section, key]]
        return _nested_faults(name, nested, [fault for fault in mine if nested.__name__ in map(str, fault["loc"])])
    allowed, words = _description(annotation), _words(annotation)
    near = _nearest(given, words) if isinstance(given, str | list) else {}
    hint = "".join(f"; nearest: {word}" for word in near)
    return {name: f"{name}={shown(given)}: allowed: {allowed}{hint}"}


def _nested_faults(name: str, model: type[BaseModel], faults: Sequence[dict]) -> dict[str, str]:
    fields = list(model.model_fields)
    unknown = [str(fault["loc"][-1]) for fault in faults if fault["type"] == "extra_forbidden"]
    lines = {}
    for fault in faults:
        part = str(fault["loc"][-1])
        if fault["type"] == "extra_forbidden":
            line = f"{name}.{part}={shown(fault['input'])}: no such setting; {_choice(part, fields, f'{name}.')}"
        elif fault["type"] == "missing":
            if any(difflib.get_close_matches(part, unknown, n=1, cutoff=0.5)):
                continue  # misspelt, and said to be
            line = f"{name}.{part} is missing; allowed: {_description(_annotation(model.model_fields[part]))}"
        else:
            allowed = _description(_annotation(model.model_fields[part]))
            line = f"{name}.{part}={shown(fault['input'])}: allowed: {allowed}"
        lines[f"{name}.{part}"] = line
    return lines


def _choice(given: str, allowed: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return f"nearest: {prefix}{near[0]}" if near else f"allowed: {', '.join(allowed)}"


def _nearest(given: str | list, words: Sequence[str]) -> dict[str, None]:
    """The allowed words that the given ones may have meant, each once."""
    texts = [given] if isinstance(given, str) else [str(item) for item in given if item not in words]
    matches = (
        [word for word in words if text and word.startswith(text)]
        or difflib.get_close_matches(text.lower(), words, n=1, cutoff=0.4)
        for text in texts
    )
    return {match[0]: None for match in matches if match}


def _at(values: Mapping[str, Any], section: str, key: str) -> Any:
    return {str(name): value for name, value in values[section].items()}.get(key)


def _fields(root: type[BaseModel], section: str) -> dict[str, FieldInfo]:
    return root.model_fields[section].annotation.model_fields if section in root.model_fields else {}


def _example(root: type[BaseModel], section: str) -> str:
    key, field = next(iter(_fields(root, section).items()))
    return f"{key}={shown(field.default)}"


def _annotation(field: FieldInfo) -> Any:
    """The field's type with its bounds, which pydantic keeps apart where the type is no union."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _members(annotation: Any) -> list[Any]:
    """The types that a union may be, or the one type."""
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _words(annotation: Any) -> list[str]:
    """Every word among the allowed values."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) if part is not annotation for word in _words(part)]


def _description(annotation: Any) -> str:
    parts = [_describe_member(member) for member in _members(annotation)]
    return ", ".join(parts[:-1]) + " or " + parts[-1] if len(parts) > 1 else parts[0]


def _describe_member(member: Any) -> str:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Annotated:
        return _describe_member(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is list:
        words = _words(arguments[0])
        return f"a list of {', '.join(words)}" if words else "a list of names"
    if origin is dict:
        return "a mapping of names to names"
    if _is_model(member):
        return "{" + ", ".join(f"{name}: text" for name in member.model_fields) + "}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return plain[member]


def _bounds(metadata: Sequence[Any]) -> str:
    said = []
    for bound in _flat(metadata):
        match bound:
            case MinLen(least):
                said.append("that is not empty" if least == 1 else f"of at least {least}")
            case Ge(least):
                said.append(f"of at least {least}")
            case Gt(least):
                said.append(f"above {least}")
            case Le(most):
                said.append(f"at most {most}")
            case Lt(most):
                said.append(f"below {most}")
    return " " + " and ".join(said) if said else ""


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Bounds, also where `Field(...)` inside a union holds them."""
    return [bound for item in metadata for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
