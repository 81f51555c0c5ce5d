"""A matrix file -> its cells, each with its whole configuration, every fault of it found before anything runs.

base: ../recipes/llama2-7b-dolly.yaml    a configuration, by its path from this file, or its sections themselves
set: {data.source: bundled}              settings of every cell, by dotted key
cells:                                   named cells: what differs
  fused: {}
  stock: {kernels.layer: stock}
axes: {train.per_device_train_batch_size: [4, 8]}   beside them, a cell for every combination of these values
exclude: [{...}]                         combinations of the axes that are left out
synthetic, tokenizer                     the shape of random weights; whose tokens; a cell may have its own
steps, warmup, floor, profile            timed steps and those before them; what else is measured
gate, reference                          the loss gate's tolerance, or false; the cell whose way is the measure of it
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packloop.bench.shapes import check_shape
from packloop.config import RunConfig, load_config, parse_config, parse_yaml, read_yaml
from packloop.config_faults import shown
from packloop.errors import ConfigError, InputError

# Keys of a cell that are no settings of a run, each with its type: on which weights, with whose tokens, and what else.
CELL_KEYS = {"synthetic": str, "tokenizer": str, "floor": bool, "profile": bool}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}")


class _MatrixFile(BaseModel):
    """The file's own keys; settings inside of them are checked as a run's are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base: str | dict[str, Any] | None = None
    set: dict[str, Any] = {}
    cells: dict[str, dict[str, Any] | None] = {}
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    exclude: list[dict[str, Any]] = []
    reference: str | None = None
    gate: Literal[False] | Annotated[float, Field(gt=0)] | None = None
    warmup: Annotated[int, Field(ge=0)] = 3
    steps: Annotated[int, Field(ge=1)] = 10
    floor: bool = False
    profile: bool = False
    synthetic: str | None = None
    tokenizer: str | None = None


# What a key's value must be, for messages.
_NEEDED = {
    "base": "a configuration's path from this file, or a mapping of its sections",
    "set": "a mapping of settings, for example {train.seed: 1},",
    "cells": "a mapping of names to settings, for example {fused: {kernels.layer: fused}},",
    "axes": "a mapping of settings to lists of values, for example {train.seed: [0, 1]},",
    "exclude": "a list of combinations, for example [{train.seed: 1}],",
    "reference": "the name of a cell",
    "gate": "a tolerance above 0 in nats a label, or false",
    "warmup": "a whole number of steps, 0 or more,",
    "steps": "a whole number of steps, 1 or more,",
    "floor": "true or false",
    "profile": "true or false",
    "synthetic": "a shape's name or a directory",
    "tokenizer": "a name or a directory",
}


class MatrixCell(BaseModel):
    """One cell. settings: what differs, by dotted key; synthetic None: the weights of the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    settings: dict[str, Any]
    config: RunConfig
    synthetic: str | None
    tokenizer: str | None
    floor: bool
    profile: bool


class Matrix(BaseModel):
    """All cells in order, and what they share. gate None: the tolerance of the cell's dtype; False: no gate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cells: list[MatrixCell]
    reference: str | None
    gate: float | Literal[False] | None
    warmup: int
    steps: int


def read_matrix(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    synthetic: str | None = None,
    tokenizer: str | None = None,
    steps: int | None = None,
    warmup: int | None = None,
) -> Matrix:
    """The matrix in the YAML file at `path`. ConfigError or InputError, with a line a fault, for anything wrong in it.

    overrides: `section.key=value` for every cell. What else is given replaces the file's.
    """
    options = {"synthetic": synthetic, "tokenizer": tokenizer, "steps": steps, "warmup": warmup}
    given = {key: value for key, value in options.items() if value is not None}
    if synthetic is not None:
        _check_shape(synthetic, "--synthetic")
    values = read_yaml(path, "matrix", "docs/benchmarks.md describes one")
    if values is not None and not isinstance(values, dict):
        keys = ", ".join(_MatrixFile.model_fields)
        raise ConfigError(f"{path}: a mapping of the matrix's keys ({keys}) is needed, given {shown(values)}")
    file = _parse(path, values or {}, given)
    replaced = dict(_override(text) for text in overrides)
    shared = file.set | replaced
    cells = _named_cells(path, file)
    if not cells:
        raise ConfigError(f"{path}: the matrix is empty; give cells (name: settings) or axes (setting: values)")
    _refuse_hidden(path, cells, {*replaced, *(key for key in CELL_KEYS if key in given)})
    base = _base(path, file.base)
    made = [_cell(path, name, settings, base, shared, file) for name, settings in cells.items()]
    if file.reference is not None and file.reference not in cells:
        raise ConfigError(f"{path}: reference={shown(file.reference)}: no such cell; {_choice(file.reference, cells)}")
    return Matrix(
        cells=made,
        reference=file.reference,
        gate=file.gate,
        warmup=file.warmup,
        steps=file.steps,
    )


def select_cells(matrix: Matrix, only: Sequence[str]) -> list[MatrixCell]:
    """The cells of these names, all without names, in the matrix's order. ConfigError for a name it does not have."""
    names = [cell.name for cell in matrix.cells]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such cell; {_choice(name, names)}")
    return [cell for cell in matrix.cells if not only or cell.name in only]


def _parse(path: Path, values: dict[str, Any], given: dict[str, Any]) -> _MatrixFile:
    try:
        return _MatrixFile.model_validate(values | given)
    except ValidationError as error:
        lines = {}
        for fault in error.errors():
            top = str(fault["loc"][0])
            if fault["type"] == "extra_forbidden":
                line = f"{top}={shown(fault['input'])}: no such key; {_choice(top, _MatrixFile.model_fields)}"
            else:
                line = f"{top}={shown((values | given)[top])}: {_NEEDED[top]} is needed"
            lines.setdefault(top, f"{path}: {line}")
        raise ConfigError("\n".join(lines.values())) from None


def _base(path: Path, base: str | dict[str, Any] | None) -> RunConfig:
    try:
        return load_config(path.parent / base) if isinstance(base, str) else parse_config(base or {})
    except InputError as error:
        place = f"base {base}" if isinstance(base, str) else "base"
        raise type(error)(_with_place(f"{path}: {place}", error)) from None


def _named_cells(path: Path, file: _MatrixFile) -> dict[str, dict[str, Any]]:
    """Name -> settings: the explicit cells, then the axes' combinations. ConfigError for names that cannot be."""
    named = [(name, settings or {}) for name, settings in file.cells.items()]
    named += _combinations(path, file)
    cells = {}
    for name, settings in named:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: the cell name {name!r} is no file name of letters, digits and . _ = , + -")
        if name in cells:
            raise ConfigError(f"{path}: two cells are called {name!r}; give one of them another name")
        cells[name] = settings
    return cells


def _combinations(path: Path, file: _MatrixFile) -> list[tuple[str, dict[str, Any]]]:
    if not file.axes:
        if file.exclude:
            raise ConfigError(f"{path}: exclude leaves out combinations of axes, and the matrix has no axes")
        return []
    lasts = [key.rpartition(".")[2] for key in file.axes]
    labels = [last if lasts.count(last) == 1 else key for key, last in zip(file.axes, lasts, strict=True)]
    made, used = [], set()
    for values in itertools.product(*file.axes.values()):
        settings = dict(zip(file.axes, values, strict=True))
        hits = [n for n, left_out in enumerate(file.exclude) if left_out.items() <= settings.items()]
        used.update(hits)
        if not hits:
            name = ",".join(f"{label}={_slug(value)}" for label, value in zip(labels, values, strict=True))
            made.append((name, settings))
    for n, left_out in enumerate(file.exclude):
        if n not in used:
            raise ConfigError(
                f"{path}: exclude {shown(left_out)} leaves out nothing: no combination of the axes has it"
            )
    return made


def _slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(shown(value) if value is None else value)
    text = text.lower() if isinstance(value, bool) else text.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+-]", "-", text)


def _refuse_hidden(path: Path, cells: dict[str, dict[str, Any]], keys: set[str]) -> None:
    """What the command line sets for all cells must not be what a cell sets for itself."""
    for key in sorted(keys):
        holders = [name for name, settings in cells.items() if key in settings]
        if holders:
            raise ConfigError(f"{path}: {key} is set by cell {', '.join(holders)}, so it cannot be set for all of them")


def _cell(
    path: Path, name: str, settings: dict[str, Any], base: RunConfig, shared: dict[str, Any], file: _MatrixFile
) -> MatrixCell:
    where = f"{path}: cell {name}"
    own = {key: settings.get(key, getattr(file, key)) for key in CELL_KEYS}
    for key, kind in CELL_KEYS.items():
        if key in settings and not isinstance(settings[key], kind):
            needed = "a name or a directory" if kind is str else "true or false"
            raise ConfigError(f"{where}: {key}={shown(settings[key])}: {needed} is needed")
    run_settings = shared | {key: value for key, value in settings.items() if key not in CELL_KEYS}
    values = base.model_dump(mode="json")
    if own["synthetic"] is not None:
        _check_shape(own["synthetic"], where)
        if "source" not in base.data.model_fields_set:
            values["data"]["source"] = "bundled"
    for key, value in run_settings.items():
        _put(values, key, value, where)
    try:
        config = parse_config(values)
    except ConfigError as error:
        raise ConfigError(_with_place(where, error)) from None
    if not config.lora.enabled:
        raise ConfigError(f"{where}: lora.enabled=false: a benchmark's steps train adapters; use lora.enabled=true")
    shown_settings = {key: value for key, value in settings.items() if CELL_KEYS.get(key) is not bool}
    return MatrixCell(name=name, settings=shown_settings, config=config, **own)


def _check_shape(shape: str, where: str) -> None:
    try:
        check_shape(shape)
    except InputError as error:
        raise ConfigError(_with_place(where, error)) from None


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets `section.key` in nested dictionaries; what is no such setting is found when they are parsed."""
    *sections, last = key.split(".")
    if key in _MatrixFile.model_fields:
        holder = "of the matrix or of a cell" if key in CELL_KEYS else "of the matrix"
        raise ConfigError(f"{where}: {key}={shown(value)}: this is no setting of a run but a key {holder}")
    if not sections:
        raise ConfigError(f"{where}: {key}={shown(value)}: section.key is needed, for example train.learning_rate")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{where}: {key}: {section} is a setting, not a section")
    target[last] = copy.deepcopy(value)


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"override {text!r}: section.key=value is needed, for example data.max_length=1024")
    return key, parse_yaml(value, f"override {text!r}")


def _with_place(where: str, error: InputError) -> str:
    return "\n".join(f"{where}: {line}" for line in str(error).splitlines())


def _choice(given: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"nearest: {near[0]}" if near else f"allowed: {', '.join(allowed)}"
