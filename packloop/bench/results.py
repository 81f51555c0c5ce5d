"""What a benchmark leaves: a directory with the matrix and one JSON file a cell, all of one schema version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from packloop.errors import InputError

SCHEMA = 1


class Record(BaseModel):
    """Base of everything written: unknown keys are refused, so that a reader never guesses."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Spread(Record):
    """Of the timed steps: median, quartiles and range."""

    median: float
    q1: float
    q3: float
    min: float
    max: float


class Figures(Record):
    """Rates a second and milliseconds a step. slots: computed, padding included; real: not padding; label: trained on.

    Real and label tokens are of all documents, each counted whole, so that there can be more real tokens than slots.
    """

    warmup_steps: int
    timed_steps: int
    step_ms: Spread
    real_tokens_per_s: Spread
    slot_tokens_per_s: Spread
    label_tokens_per_s: Spread
    real_tokens_per_step: float
    slot_tokens_per_step: float
    label_tokens_per_step: float
    step_ms_all: list[float]
    losses: list[float]


class Memory(Record):
    """GPU memory at the peak, GiB. counted: reserved and managed (paged optimizer state)."""

    peak_allocated_gib: float
    peak_reserved_gib: float
    managed_gib: float
    peak_counted_gib: float


class Flops(Record):
    """TFLOP/s of the median step. model: what the mathematics needs; hardware: what was executed (`bench.flops`)."""

    model_tflops: float
    hardware_tflops: float
    peak_tflops: float
    peak_source: str
    model_utilisation: float
    hardware_utilisation: float


class Ceilings(Record):
    """Measured beside the steps: matrix products of the model's shapes in its dtype, and a device copy.

    In the cell's own process; of a comparison with other trainers after all turns, in a process of its own.
    """

    gemm_tflops: float
    copy_tb_per_s: float


class Floor(Record):
    """The step's matrix products and attention alone, as fast as they go, timed beside the steps."""

    fraction: float
    ms: float
    parts_ms: dict[str, float]
    attention: str


class Profile(Record):
    """GPU milliseconds of one step by class of kernel; idle: the step's time in which no kernel ran.

    device: whose work it is; on a CPU the classes are of operators, and idle is time outside of them. by_phase_ms: the
    same milliseconds by forward, recomputation, backward and update.
    """

    device: Literal["gpu", "cpu"] = "gpu"
    step_ms: float
    busy_ms: float
    idle_share: float
    by_class_ms: dict[str, float]
    by_phase_ms: dict[str, float] = {}


class LossGate(Record):
    """Some steps on one window, without dropout, against the same steps taken the reference's way.

    largest_difference: of the losses, in nats a label; of the gradients' norms, relative.
    """

    reference: str
    largest_difference: float
    allowed: float
    passed: bool
    largest_gradient_difference: float | None = None
    allowed_gradient: float | None = None
    losses: list[float] = []
    reference_losses: list[float] = []


class GpuState(Record):
    """As nvidia-smi reads it; None where it cannot."""

    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None


class Conditions(Record):
    """What a figure depends on beside its settings."""

    device: str
    device_memory_gib: float | None
    driver: str | None
    cuda: str | None
    python: str
    before: GpuState | None
    after: GpuState | None
    versions: dict[str, str]
    commit: str | None
    uncommitted_changes: bool | None
    date: str


class Cell(Record):
    """One run of one setting in a process of its own, whatever came of it.

    session: cells of one session ran beside each other, and only those share a chart. settings: dotted keys in which
    the cell differs from its matrix's base. config: the whole resolved configuration; of a peer, its own settings.
    asked: the configuration before `auto` was settled; None where that was not recorded, or where nothing is settled.
    status wrong: the loss gate failed, so its rate says nothing.
    """

    schema_version: Literal[1] = SCHEMA
    name: str
    who: str = "packloop"
    session: str
    status: Literal["measured", "out_of_memory", "failed", "wrong"]
    reason: str | None = None
    shape: str
    num_parameters: int | None = None
    settings: dict[str, Any]
    config: dict[str, Any]
    asked: dict[str, Any] | None = None
    figures: Figures | None = None
    memory: Memory | None = None
    flops: Flops | None = None
    ceilings: Ceilings | None = None
    floor: Floor | None = None
    profile: Profile | None = None
    loss_gate: LossGate | None = None
    conditions: Conditions


def save_cell(directory: Path, cell: Cell) -> Path:
    """Writes `cells/NAME.json` in one move, so that an interrupted run leaves whole cells only."""
    path = directory / "cells" / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def load_cells(directory: Path) -> list[Cell]:
    """Every cell in a results directory, by name. InputError for one of another schema version, or none at all."""
    files = sorted((directory / "cells").glob("*.json"))
    if not files:
        raise InputError(f"results {str(directory)!r}: no cells/*.json in it; `packloop bench run` writes them")
    return [load_cell(path) for path in files]


def load_cell(path: Path) -> Cell:
    """One cell's file. InputError where it is no cell of this schema version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"result {str(path)!r} cannot be read: {error}; delete it and run the matrix again") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA:
        raise InputError(
            f"result {str(path)!r} has schema version {version!r}, this packloop reads {SCHEMA}; "
            "run the matrix again, or use the packloop that wrote it"
        )
    try:
        return Cell.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"result {str(path)!r}: {where}: {first['msg']}; it was not written by packloop") from None
