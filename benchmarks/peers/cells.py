"""Rows as cells of a results directory, for `packloop bench report`: one a setting, the laps of its turns joined."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import is_measured
from packloop.bench.conditions import describe_conditions
from packloop.bench.flops import flop_figures
from packloop.bench.results import Ceilings, Cell, Conditions, Figures, Floor, Flops, Memory, save_cell
from packloop.bench.steps import Lap, lap_figures

Row = dict[str, Any]
# Options of ours -> keys of packloop's configuration; the peers' keep the names they have.
_OUR_KEYS = {
    "batch": "train.per_device_train_batch_size",
    "accumulation": "train.gradient_accumulation_steps",
    "length": "data.max_length",
    "packing": "data.packing",
    "dropout": "lora.dropout",
    "targets": "lora.target_modules",
    "attention": "kernels.attention",
    "layer": "kernels.layer",
    "gated": "kernels.gated",
    "padding": "kernels.padding",
    "prefix_reuse": "kernels.prefix_reuse",
    "recompute_layers": "train.gradient_checkpointing",
    "cached_layers": "kernels.dequant_cache",
    "keep_inputs_layers": "kernels.keep_inputs",
    "memory_cap_gib": "train.memory_budget_gib",
}
_OF_THE_RUN = ("warmup", "steps", "seed", "floor", "shape")


def save_cells(directory: Path, rows: list[Row], *, session: str, shape: str) -> list[Path]:
    """Writes a cell for all rows of one name; directory: what `packloop bench report` is given."""
    settings: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        settings.setdefault((row["turn"], row.get("batch")), []).append(row)
    cells = [make_cell(members, session=session, shape=shape, all_rows=rows) for members in settings.values()]
    return [save_cell(directory, cell) for cell in cells]


def make_cell(rows: list[Row], *, session: str, shape: str, all_rows: list[Row]) -> Cell:
    """Of the turns of one setting; where none was measured, of the reason. all_rows: of the session.

    Laps to warm up come first in `step_ms_all`, then the timed ones, turn after turn.
    """
    measured = [row for row in rows if is_measured(row)]
    row = (measured or rows)[0]
    turn, batch = row["turn"], row.get("batch")
    settings = row.get("settings", {})
    status = "measured" if measured else "out_of_memory" if row.get("out_of_memory") else "failed"
    ceilings = Ceilings(**row["ceilings"]) if "ceilings" in row else None
    figures = _figures(measured) if measured else None
    conditions = _conditions(rows, all_rows)
    missing = [_reason(other) for other in rows if not is_measured(other)]
    return Cell(
        name=_name(turn, row["who"], settings.get("batch", batch)),
        who=row["who"],
        session=session,
        status=status,
        reason="; ".join(missing) or None,
        shape=shape,
        settings=_shown(settings, ours=row["who"] == "packloop"),
        config=row.get("config", {key: value for key, value in settings.items() if key not in _OF_THE_RUN}),
        asked=row.get("asked"),
        num_parameters=row.get("num_parameters"),
        figures=figures,
        memory=_memory(measured),
        flops=_flops(measured, figures, conditions, ceilings),
        ceilings=ceilings,
        floor=_floor(measured),
        conditions=conditions,
    )


def _name(turn: str, who: str, batch: int | None) -> str:
    """Of ours packloop and the turn, of a peer's the turn, as reports put whose it is in front; then the batch."""
    kept = turn.removeprefix("ours, ").removeprefix("ours ").removeprefix(who).removeprefix(", ")
    words = "" if kept in ("A", "B") else kept
    words = f"{'packloop' if who == 'packloop' else ''} {words} {'' if batch is None else f'batch {batch}'}"
    return re.sub(r"[^a-z0-9.]+", "-", words.replace("'", "").lower()).strip("-") or "not-run"


def _reason(row: Row) -> str:
    return row.get("reason") or row.get("skipped") or row["failed"].splitlines()[-1]


def _shown(settings: Row, *, ours: bool) -> Row:
    if not ours:
        return {key: value for key, value in settings.items() if key not in _OF_THE_RUN}
    return {_OUR_KEYS[key]: value for key, value in settings.items() if key in _OUR_KEYS and value is not None}


def _figures(rows: list[Row]) -> Figures:
    warm = [Lap(**lap) for row in rows for lap in row["laps"][: row["warmup_steps"]]]
    timed = [Lap(**lap) for row in rows for lap in row["laps"][row["warmup_steps"] :]]
    return Figures.model_validate(lap_figures(warm + timed, len(warm)))


def _flops(rows: list[Row], figures: Figures | None, conditions: Conditions, ceilings: Ceilings | None) -> Flops | None:
    """Of the average step of all turns in the median step's time. Every side's base is in bf16."""
    known = [row["flops_per_step"] for row in rows if "flops_per_step" in row]
    if not known or figures is None:
        return None
    return flop_figures(
        needed=statistics.fmean(flops["needed"] for flops in known),
        executed=statistics.fmean(flops["executed"] for flops in known),
        step_ms=figures.step_ms.median,
        device=conditions.device,
        dtype="bfloat16",
        ceilings=ceilings,
    )


def _memory(rows: list[Row]) -> Memory | None:
    """The largest of the turns."""
    keys = Memory.model_fields
    known = [row for row in rows if all(key in row for key in keys)]
    return Memory(**{key: max(row[key] for row in known) for key in keys}) if known else None


def _floor(rows: list[Row]) -> Floor | None:
    """Of all turns' medians, as `floor_figures` takes them in one."""
    known = [row for row in rows if "floor" in row]
    if not known:
        return None
    floors = [ms for row in known for ms in row["floor_ms_all"][row["warmup_steps"] :]]
    steps = [lap["ms"] for row in known for lap in row["laps"][row["warmup_steps"] :]]
    floor_ms = statistics.median(floors)
    report = known[0]["floor"]
    return Floor(
        fraction=floor_ms / statistics.median(steps),
        ms=floor_ms,
        parts_ms=report["products_ms"],
        attention=report["attention"],
    )


def _conditions(rows: list[Row], all_rows: list[Row]) -> Conditions:
    """Of the first turn to the last; a turn that never ran has those of the session, without a state of the GPU."""
    known = [row["conditions"] for row in rows if "conditions" in row]
    if known:
        return Conditions(**{**known[0], "after": known[-1]["after"]})
    of_others = next((row["conditions"] for row in all_rows if "conditions" in row), None)
    if of_others is None:
        return describe_conditions(None, None)
    return Conditions(**{**of_others, "before": None, "after": None})
