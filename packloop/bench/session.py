"""A results directory as a run fills it: the plan of all cells, and the conditions that every one of them must share.

matrix.json      the plan: every cell's whole configuration, and what its gate holds it to
conditions.json  of the first process that ran
references/      what the reference of each gate gave        cells/  a result a cell        logs/  a log a process
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import packloop.bench.gate as gates
from packloop.bench.matrix import Matrix
from packloop.bench.results import SCHEMA, Conditions, Record
from packloop.config import parse_config
from packloop.errors import ConfigError, InputError

# Conditions of a moment; all others must be the same for every cell of a session.
_MOMENTARY = ("before", "after", "date")
_MEASURED_CODE = ("data", "kernels", "engine")
# A URL, which a message needs whole unless it is of a file here; or the folders in front of a path's last name.
_URL_OR_FOLDERS = re.compile(
    r"\b((?!file:)[A-Za-z][\w+.-]*://[^\s'\"]*)|(?<![\w.])~?/(?:[^\s/'\":,]+/)+(?=[^\s/'\":,])"
)


class CellPlan(Record):
    """One cell. config: of a whole run; reference: key of what its gate holds it to, None without a gate."""

    name: str
    settings: dict[str, Any]
    config: dict[str, Any]
    synthetic: str | None
    tokenizer: str | None
    floor: bool
    profile: bool
    reference: str | None


class ReferencePlan(Record):
    """Steps that cells are held to. may_fall_back: to sdpa, where eager attention's scores find no room."""

    config: dict[str, Any]
    synthetic: str | None
    tokenizer: str | None
    may_fall_back: bool


class Plan(Record):
    """All that the cells' processes need to know. code: of the package's parts that are measured."""

    schema_version: Literal[1] = SCHEMA
    code: str
    commit: str | None
    gate: float | None
    warmup: int
    steps: int
    cells: list[CellPlan]
    references: dict[str, ReferencePlan]

    def cell(self, name: str) -> CellPlan:
        return next(cell for cell in self.cells if cell.name == name)


def make_plan(matrix: Matrix, *, commit: str | None = None) -> Plan:
    """commit: named in results that are measured outside a git checkout."""
    way = next((cell.config for cell in matrix.cells if cell.name == matrix.reference), None)
    cells, references = [], {}
    for cell in matrix.cells:
        key = None
        if matrix.gate is not False:
            try:
                config = gates.reference_config(cell.config, way)
            except ConfigError as error:
                raise ConfigError(f"cell {cell.name} held to {matrix.reference}: {error}") from None
            key = gates.reference_key(config, cell.synthetic, cell.tokenizer)
            references[key] = ReferencePlan(
                config=config.model_dump(mode="json"),
                synthetic=cell.synthetic,
                tokenizer=cell.tokenizer,
                may_fall_back=way is None,
            )
        values = cell.model_dump(mode="json", exclude={"config"})
        cells.append(CellPlan(**values, config=cell.config.model_dump(mode="json"), reference=key))
    return Plan(
        code=_code_digest(),
        commit=commit,
        gate=matrix.gate or None,
        warmup=matrix.warmup,
        steps=matrix.steps,
        cells=cells,
        references=references,
    )


@contextmanager
def opened(directory: Path, plan: Plan) -> Iterator[None]:
    """Begins a session in `directory` or continues the one that is there; nobody else may write to it meanwhile.

    InputError where the directory holds something else, another plan, or is in use.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "matrix.json"
    if not path.exists() and any(entry.name != ".lock" for entry in directory.iterdir()):
        raise InputError(f"--output {str(directory)!r} is not empty and holds no matrix.json; give another directory")
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output {str(directory)!r}: another `packloop bench run` writes to it") from None
        if path.exists():
            change = _difference(load_plan(directory), plan)
            if change:
                raise InputError(
                    f"--output {str(directory)!r} was begun with another matrix ({change}); give another directory"
                )
        else:
            session = f"{datetime.date.today().isoformat()}-{secrets.token_hex(3)}"
            _write(path, {"session": session, "plan": plan.model_dump(mode="json")})
        yield


def load_plan(directory: Path) -> Plan:
    """The plan of the session in `directory`. InputError for one of another schema version."""
    values = _read(directory / "matrix.json")["plan"]
    if values.get("schema_version") != SCHEMA:
        raise InputError(
            f"results {str(directory)!r} have schema version {values.get('schema_version')!r}, this packloop writes "
            f"{SCHEMA}; give another --output"
        )
    return Plan.model_validate(values)


def session_of(directory: Path) -> str:
    """The name that all cells of the directory's session carry."""
    return _read(directory / "matrix.json")["session"]


def check_conditions(directory: Path, conditions: Conditions) -> None:
    """Keeps the first process's conditions. InputError, naming what changed, where a later one's are others."""
    path = directory / "conditions.json"
    now = conditions.model_dump(mode="json")
    if not path.exists():
        _write(path, now)
        return
    then = _read(path)
    changed = [key for key in now if key not in _MOMENTARY and now[key] != then.get(key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"results {str(directory)!r} were begun under other conditions ({key}: {then.get(key)} -> {now[key]}); "
            "give another --output"
        )


def load_conditions(directory: Path) -> Conditions | None:
    path = directory / "conditions.json"
    return Conditions.model_validate(_read(path)) if path.exists() else None


def save_reference(directory: Path, key: str, reference: gates.Reference) -> None:
    _write(directory / "references" / f"{key}.json", reference.model_dump(mode="json"))


def load_reference(directory: Path, key: str) -> gates.Reference | None:
    path = directory / "references" / f"{key}.json"
    return gates.Reference.model_validate(_read(path)) if path.exists() else None


def described_config(config: dict[str, Any], plan: Plan, cell: CellPlan) -> dict[str, Any]:
    """A configuration, settled or as asked for, as a result has it: with what the benchmark was told, no folders."""
    told = {"synthetic": cell.synthetic, "tokenizer": cell.tokenizer, "warmup": plan.warmup, "steps": plan.steps}
    return public({**config, "bench": told})


def public(value: Any) -> Any:
    """The value with every absolute path reduced to its last name: a result says nothing of a machine's folders."""
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [public(one) for one in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("./", "../", "~"))):
        return Path(value).name
    return value


def without_paths(text: str) -> str:
    """A message with every absolute path in it reduced to its last name; URLs stay as they are."""
    return _URL_OR_FOLDERS.sub(lambda found: found[1] or "", text)


def _difference(then: Plan, now: Plan) -> str | None:
    """The first thing in which two plans differ, in words."""
    for name in ("warmup", "steps", "gate", "commit"):
        if getattr(then, name) != getattr(now, name):
            return f"{name}: {getattr(then, name)} -> {getattr(now, name)}"
    old, new = ({cell.name: cell for cell in plan.cells} for plan in (then, now))
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new or name not in old:
            return f"cell {name} is {'not in it' if name not in old else 'missing now'}"
        if old[name] != new[name]:
            return f"cell {name}: {_changed_setting(old[name], new[name])}"
    return "packloop's code has changed since" if then.code != now.code else None


def _changed_setting(old: CellPlan, new: CellPlan) -> str:
    before, after = parse_config(old.config).model_dump(), parse_config(new.config).model_dump()
    for section, settings in after.items():
        for key, value in settings.items():
            if before[section][key] != value:
                return f"{section}.{key}: {before[section][key]} -> {value}"
    return "other weights, tokens, reference or figures asked for"


def _code_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for part in _MEASURED_CODE for path in (root / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}; give another --output") from None
    if not isinstance(values, dict):
        raise InputError(f"{str(path)!r} was not written by packloop; give another --output")
    return values
