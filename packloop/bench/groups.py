"""Which cells of a session belong into one chart: at the same batch, and each way at its best batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packloop.bench.plots import rate_of
from packloop.bench.results import Cell

# What packloop's configuration and the peers' settings call the packs of a micro-batch and the micro-batches of a step.
_BATCH_KEYS = ("train.per_device_train_batch_size", "per_device_train_batch_size", "batch")
_ACCUMULATION_KEYS = ("train.gradient_accumulation_steps", "gradient_accumulation_steps", "accumulation")
_LENGTH_KEYS = ("data.max_length", "max_length", "length")
_ATTENTION_KEYS = ("kernels.attention", "attention", "attn_implementation")


@dataclass(frozen=True)
class Group:
    """Cells of one chart. short: of the title, for a column; rule: what they share, in words."""

    title: str
    short: str
    rule: str
    cells: list[Cell]


def groups_of(cells: list[Cell]) -> list[Group]:
    """The charts of one session's cells: those of each batch that several share, then each way at its best batch.

    Where these leave a cell out, one more chart has all of them.
    """
    groups = []
    for shape in dict.fromkeys(cell.shape for cell in cells):
        of_shape = [cell for cell in cells if cell.shape == shape]
        same = _same_batch(shape, of_shape)
        charts = [group for group in same if len(group.cells) > 1]
        best = _best_batch(shape, of_shape)
        if len(same) > 1 and len(best.cells) > 1:
            charts.append(best)
        shown = {id(cell) for chart in charts for cell in chart.cells}
        if len(shown) < len(of_shape):
            charts.append(Group(f"{shape}, all cells", "all cells", "Every cell of this shape.", of_shape))
        groups.extend(charts)
    return groups


def _same_batch(shape: str, cells: list[Cell]) -> list[Group]:
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        found.setdefault((batch_of(cell), accumulation_of(cell), length_of(cell)), []).append(cell)
    groups = []
    for (batch, accumulation, length), members in found.items():
        words = f"batch {_shown(batch)} x {_shown(accumulation)} micro-batches x {_shown(length)} tokens"
        groups.append(Group(f"{shape}, {words}", f"batch {_shown(batch)}", "All at the same batch.", members))
    return groups


def _best_batch(shape: str, cells: list[Cell]) -> Group:
    """Of the cells that differ in nothing but the batch, the fastest; where none has a rate, the smallest batch."""
    ways: dict[tuple, list[Cell]] = {}
    for cell in cells:
        ways.setdefault(_way(cell), []).append(cell)
    best = [max(members, key=lambda cell: (rate_of(cell) or 0.0, -(batch_of(cell) or 0))) for members in ways.values()]
    rule = "Each way at the fastest of the batches that it was run with."
    return Group(f"{shape}, each at its best batch", "best batch", rule, best)


def _way(cell: Cell) -> tuple:
    """What tells one way of training from another: the settings, but for the size of a step."""
    sizes = {*_BATCH_KEYS, *_ACCUMULATION_KEYS}
    # Of packloop's, no settings means the matrix's base; a peer may have told no more than its configuration.
    settings = cell.settings if cell.who == "packloop" else cell.settings or cell.config
    return cell.who, *sorted((key, repr(value)) for key, value in settings.items() if key not in sizes)


def reference_of(cells: list[Cell]) -> Cell | None:
    """The eager path, packloop's before another's, else what the loss gates name, else the fastest other trainer.

    None where none of these has a rate.
    """
    rated = sorted((cell for cell in cells if rate_of(cell)), key=lambda cell: cell.who != "packloop")
    eager = [cell for cell in rated if attention_of(cell) == "eager"]
    named = {cell.loss_gate.reference for cell in rated if cell.loss_gate}
    others = sorted((cell for cell in rated if cell.who != "packloop"), key=rate_of, reverse=True)
    return next(iter([*eager, *(cell for cell in rated if cell.name in named), *others]), None)


def batch_of(cell: Cell) -> int | None:
    """Packs a micro-batch."""
    return _first(cell, _BATCH_KEYS)


def accumulation_of(cell: Cell) -> int | None:
    """Micro-batches an optimizer step."""
    return _first(cell, _ACCUMULATION_KEYS)


def length_of(cell: Cell) -> int | None:
    """Tokens a pack."""
    return _first(cell, _LENGTH_KEYS)


def attention_of(cell: Cell) -> str | None:
    """As the trainer calls it."""
    return _first(cell, _ATTENTION_KEYS)


def setting(cell: Cell, dotted: str) -> Any:
    """A value of the resolved configuration by its dotted key, else of the settings; None where neither has it."""
    value: Any = cell.config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return cell.settings.get(dotted) if value is None else value


def chosen_by_auto(cell: Cell) -> list[str]:
    """Dotted keys of what was settled for the cell; none where it does not tell what was asked for."""
    return [
        f"{section}.{key}"
        for section, values in (cell.asked or {}).items()
        for key, value in values.items()
        if value == "auto" and cell.config[section][key] != "auto"
    ]


def _first(cell: Cell, keys: tuple[str, ...]) -> Any:
    return next((value for key in keys if (value := setting(cell, key)) is not None), None)


def _shown(value: Any) -> str:
    return "?" if value is None else str(value)
