"""Instances and what they cost an hour: the file that is shipped, or one's own of the same form."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from packloop.config import parse_yaml, read_yaml
from packloop.errors import ConfigError
from packloop.gpus import Gpu, require_gpu

_HELP = "packloop/bench/prices.yaml, which is shipped, shows the form"


class Instance(BaseModel):
    """A machine for rent. dollars_per_hour: of the whole machine; date, source: when and where that was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    where: Annotated[str, Field(min_length=1)]
    gpu: str
    gpus: Annotated[int, Field(ge=1)]
    dollars_per_hour: Annotated[float, Field(gt=0)]
    date: str
    source: Annotated[str, Field(min_length=1)]

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, key: str) -> str:
        require_gpu(key)
        return key

    @field_validator("date", mode="before")
    @classmethod
    def _is_dated(cls, date: object) -> str:
        text = date.isoformat() if isinstance(date, datetime.date) else str(date)
        for form in ("%Y-%m-%d", "%Y-%m"):
            try:
                datetime.datetime.strptime(text, form)
            except ValueError:
                continue
            return text
        raise ValueError("a date as 2026-11-09 or 2026-11 is needed")

    @property
    def model(self) -> Gpu:
        """Of its GPUs, all alike."""
        return require_gpu(self.gpu)

    @property
    def dollars_per_gpu_hour(self) -> float:
        """One GPU's share, as if the others were used as well."""
        return self.dollars_per_hour / self.gpus


def load_prices(path: Path | None = None, names: Sequence[str] = ()) -> list[Instance]:
    """The instances of a price file, of the one that is shipped without a path; of `names` only, where there are any.

    Raises `InputError` for a file that cannot be read, `ConfigError` for what is in it and for names that are not.
    """
    if path is None:
        where = "packloop/bench/prices.yaml"
        text = resources.files("packloop.bench").joinpath("prices.yaml").read_text(encoding="utf-8")
        values = parse_yaml(text, where)
    else:
        where, values = str(path), read_yaml(path, "prices", _HELP)
    listed = values.get("instances") if isinstance(values, dict) else None
    if not isinstance(listed, dict) or not listed or set(values) != {"instances"}:
        raise ConfigError(f"prices {where!r}: `instances:` with at least one instance, and nothing else; {_HELP}")
    known = {str(name): _instance(where, str(name), fields) for name, fields in listed.items()}
    for name in names:
        if name not in known:
            raise ConfigError(f"--instance {name}: not in {where!r}; it has {', '.join(known)}")
    return [known[name] for name in names or known]


def _instance(where: str, name: str, fields: object) -> Instance:
    if not isinstance(fields, dict):
        raise ConfigError(f"prices {where!r}: {name} must be a section of keys; {_HELP}")
    try:
        return Instance.model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        words = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"prices {where!r}: {name}.{key}: {words}; {_HELP}") from None
