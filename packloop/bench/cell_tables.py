"""Tables of a session's cells: rates and memory, ratios to the reference, utilisation and checks."""

from __future__ import annotations

from packloop.bench.document import Attachment, Entry, Reference, Table
from packloop.bench.drawing import IDLE
from packloop.bench.groups import Group, batch_of, reference_of
from packloop.bench.kernel_classes import CLASSES
from packloop.bench.plots import ms_per_thousand, pieces_of, rate_of
from packloop.bench.results import Cell, Figures, GpuState

NONE = "-"
STATUS_WORDS = {"measured": "measured", "out_of_memory": "out of memory", "failed": "failed", "wrong": "wrong result"}

# (session, who, name) of a cell -> its conditions and configuration.
Attachments = dict[tuple[str, str, str], Attachment]


def label_of(cell: Cell) -> str:
    """The cell's name, after whose it is where that is not packloop."""
    return cell.name if cell.who in ("packloop", cell.name) else f"{cell.who}: {cell.name}"


def key_of(cell: Cell) -> tuple[str, str, str]:
    return cell.session, cell.who, cell.name


def rates_table(cells: list[Cell], attachments: Attachments) -> Table:
    """Fastest first; the cell's name leads to its conditions."""
    columns = [
        "cell",
        "#real tokens/s",
        "#first to third quartile",
        "#slot tokens/s",
        "#label tokens/s",
        "#ms a step",
        "#timed steps",
        "#allocated GiB",
        "#reserved GiB",
        "result",
    ]
    rows: list[list[Entry]] = []
    for cell in by_rate(cells):
        figures, memory = cell.figures if rate_of(cell) else None, cell.memory
        spread = figures.real_tokens_per_s if figures else None
        rows.append(
            [
                Reference(label_of(cell), attachments[key_of(cell)]),
                f"{spread.median:,.0f}" if spread else NONE,
                f"{spread.q1:,.0f} to {spread.q3:,.0f}" if spread else NONE,
                f"{figures.slot_tokens_per_s.median:,.0f}" if figures else NONE,
                f"{figures.label_tokens_per_s.median:,.0f}" if figures else NONE,
                f"{figures.step_ms.median:,.1f}" if figures else NONE,
                str(figures.timed_steps) if figures else NONE,
                f"{memory.peak_allocated_gib:.1f}" if memory else NONE,
                f"{memory.peak_reserved_gib:.1f}" if memory else NONE,
                STATUS_WORDS[cell.status] + (f": {cell.reason}" if cell.reason else ""),
            ]
        )
    return Table(columns, rows)


def shared_words(cells: list[Cell]) -> list[str]:
    """A line for each cell with a rate that computed fewer slots than it had real tokens: what it computed once."""
    lines = []
    for cell in by_rate(cells):
        share = shared_share(cell.figures) if rate_of(cell) else 0.0
        if share > 0:
            lines.append(
                f"{label_of(cell)}: at least {share:.1%} of its real tokens repeat a beginning that documents of a "
                "micro-batch share, which is computed once; its utilisation by model FLOPs counts it in each of them, "
                "by hardware FLOPs once, and its floor is of the slots computed"
            )
    return lines


def shared_share(figures: Figures) -> float:
    """Of the real tokens, those that no slot was computed for, at least: slots of padding hide as many. 0 for none."""
    return max(0.0, 1 - figures.slot_tokens_per_step / figures.real_tokens_per_step)


def ratios_table(cells: list[Cell], groups: list[Group]) -> Table | None:
    """Against the reference of each chart that has one; None where none has."""
    with_reference = [(group, reference) for group in groups if (reference := reference_of(group.cells))]
    if not with_reference:
        return None
    columns = ["cell", "#batch"]
    columns += [f"#{group.short}: x {label_of(reference)}" for group, reference in with_reference]
    rows: list[list[Entry]] = []
    for cell in by_rate(cells):
        ratios = [_ratio(cell, group, reference) for group, reference in with_reference]
        if any(ratio != NONE for ratio in ratios):
            rows.append([label_of(cell), str(batch_of(cell) or NONE), *ratios])
    return Table(columns, rows)


def _ratio(cell: Cell, group: Group, reference: Cell) -> str:
    if not rate_of(cell) or not any(cell is one for one in group.cells):
        return NONE
    return f"{rate_of(cell) / rate_of(reference):.2f}"


def checks_table(cells: list[Cell]) -> Table:
    """Utilisation, ceilings measured in the cell's process, the loss gate, and the GPU's state around the run."""
    columns = [
        "cell",
        "#model FLOP utilisation",
        "#hardware FLOP utilisation",
        "#of peak TFLOP/s",
        "#GEMM here TFLOP/s",
        "#copy here TB/s",
        "#floor's share of the step",
        "losses off by (allowed)",
        "clock, power, temperature: before → after",
    ]
    rows: list[list[Entry]] = []
    for cell in by_rate(cells):
        flops, ceilings = cell.flops, cell.ceilings
        rows.append(
            [
                label_of(cell),
                f"{flops.model_utilisation:.1%}" if flops else NONE,
                f"{flops.hardware_utilisation:.1%}" if flops else NONE,
                f"{flops.peak_tflops:,.4g}" if flops else NONE,
                f"{ceilings.gemm_tflops:,.4g}" if ceilings else NONE,
                f"{ceilings.copy_tb_per_s:.3g}" if ceilings else NONE,
                f"{cell.floor.fraction:.1%}" if cell.floor else NONE,
                _gate_words(cell),
                _state_words(cell.conditions.before, cell.conditions.after),
            ]
        )
    return Table(columns, rows)


def time_table(cells: list[Cell]) -> Table:
    """Milliseconds per 1,000 real tokens by class of work, of cells with a profile."""
    names = [name for name in [*CLASSES, IDLE] if any(name in pieces_of(cell) for cell in cells)]
    rows: list[list[Entry]] = []
    for cell in by_rate(cells):
        pieces = pieces_of(cell)
        shown = [f"{ms_per_thousand(cell, pieces[name]):.2f}" if name in pieces else NONE for name in names]
        rows.append([label_of(cell), *shown, f"{ms_per_thousand(cell, sum(pieces.values())):.2f}"])
    return Table(["cell", *(f"#{name}" for name in names), "#step"], rows)


def by_rate(cells: list[Cell]) -> list[Cell]:
    """Fastest first, then those without a rate, in their order."""
    return sorted(cells, key=lambda cell: -(rate_of(cell) or 0.0))


def _gate_words(cell: Cell) -> str:
    gate = cell.loss_gate
    if gate is None:
        return NONE
    words = f"{gate.largest_difference:.2g} ({gate.allowed:.2g})"
    if gate.largest_gradient_difference is not None and gate.allowed_gradient is not None:
        words += f", gradients {gate.largest_gradient_difference:.2g} ({gate.allowed_gradient:.2g})"
    return words if gate.passed else f"FAILED: {words}"


def _state_words(before: GpuState | None, after: GpuState | None) -> str:
    parts = []
    for unit, field in (("MHz", "sm_clock_mhz"), ("W", "power_w"), ("°C", "temperature_c")):
        values = [getattr(state, field, None) for state in (before, after)]
        if any(value is not None for value in values):
            parts.append(" → ".join(NONE if value is None else f"{value:.0f}" for value in values) + f" {unit}")
    return ", ".join(parts) or NONE
