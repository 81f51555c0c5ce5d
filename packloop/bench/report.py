"""`packloop bench report`: results directories -> report.md and report.html, every row with its conditions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from packloop.bench.document import Attachment, Bullets, Document, Heading, Paragraph, Picture, Reference, Table
from packloop.bench.document import write_document as write_document
from packloop.bench.groups import Group, groups_of, reference_of
from packloop.bench.plots import rate_of, rates_plot
from packloop.bench.results import Cell, GpuState, Spread, load_cells
from packloop.errors import InputError

STATUS_WORDS = {"measured": "measured", "out_of_memory": "out of memory", "failed": "failed", "wrong": "wrong result"}
NONE = "-"


def gather_cells(directories: Sequence[Path]) -> list[Cell]:
    """The cells of all directories, sessions in the order in which they are first met."""
    cells: list[Cell] = []
    for directory in dict.fromkeys(path.resolve() for path in directories):
        if not directory.is_dir():
            raise InputError(f"results {str(directory)!r}: no such directory; `packloop bench run` writes one")
        cells.extend(load_cells(directory))
    return cells


def write_report(directories: Sequence[Path], output: Path) -> tuple[Path, Path]:
    """Writes the report of all directories; returns the paths of its Markdown and its page."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {str(output)!r} is a file; give a directory")
    document = build_report(gather_cells(directories))
    output.mkdir(parents=True, exist_ok=True)
    return write_document(document, output)


def build_report(cells: list[Cell]) -> Document:
    """The whole report, not yet written anywhere."""
    sessions = {session: [cell for cell in cells if cell.session == session] for session in _in_order(cells)}
    document = Document("Benchmark report")
    document.add(Paragraph(_summary(cells)), Bullets(_HOW_TO_READ))
    attachments = _attachments(cells)
    for session, members in sessions.items():
        _add_session(document, session, members, attachments)
    document.add(Heading("Conditions of every row"), *attachments.values())
    return document


_HOW_TO_READ = [
    "Rates are in real tokens/s: padding is not counted. Slots are batch x length, labels the tokens trained on.",
    "A rate is the median of the timed steps, and its spread the first to the third quartile of them.",
    "Cells of one session ran beside each other. Cells of different sessions are never in one chart.",
    "Out of memory, failed and wrong are results too: their rows and charts say the reason.",
]


def _summary(cells: list[Cell]) -> str:
    counts = [(words, sum(cell.status == status for cell in cells)) for status, words in STATUS_WORDS.items()]
    sessions = len(_in_order(cells))
    shown = ", ".join(f"{count} {words}" for words, count in counts if count)
    return f"{len(cells)} cells in {sessions} session{'s' if sessions > 1 else ''}: {shown}."


def _in_order(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.session for cell in cells))


def _add_session(
    document: Document, session: str, cells: list[Cell], attachments: dict[tuple[str, str, str], Attachment]
) -> None:
    document.add(Heading(f"Session {session}"), Bullets(_shared_conditions(cells)))
    groups = groups_of(cells)
    for group in groups:
        labels = [(label_of(cell), cell) for cell in group.cells]
        reference = reference_of(group.cells)
        svg = rates_plot(labels, title=group.title, reference=label_of(reference) if reference else None)
        document.add(Picture(_slug(f"{session} {group.title}"), f"Real tokens/s, {group.title}", svg, _caption(group)))
    document.add(Heading("Throughput and memory", 3), _rates_table(cells, attachments))
    document.add(Heading("Utilisation and checks", 3), _checks_table(cells))


def _caption(group: Group) -> str:
    reference = reference_of(group.cells)
    return f"{group.rule} x is against {label_of(reference)}." if reference else group.rule


def label_of(cell: Cell) -> str:
    """The cell's name, after whose it is where it is not packloop's."""
    return cell.name if cell.who == "packloop" else f"{cell.who}: {cell.name}"


def _shared_conditions(cells: list[Cell]) -> list[str]:
    """What all cells of a session have in common, and for the rest the values that occur."""
    conditions = [cell.conditions for cell in cells]
    packages = sorted({name for one in conditions for name in one.versions})

    def values(of) -> str:
        found = dict.fromkeys(str(of(one)) for one in conditions if of(one) is not None)
        return " / ".join(found) or "unknown"

    lines = [
        f"device {values(lambda one: one.device)}"
        + (f", {values(lambda one: one.device_memory_gib)} GiB" if conditions[0].device_memory_gib else ""),
        f"driver {values(lambda one: one.driver)}, CUDA {values(lambda one: one.cuda)}, "
        f"Python {values(lambda one: one.python)}",
        ", ".join(f"{name} {values(lambda one, name=name: one.versions.get(name))}" for name in packages),
        f"commit {values(_commit)}, {values(lambda one: one.date)}",
    ]
    shapes = dict.fromkeys(cell.shape for cell in cells)
    return [*lines, f"model shape {' / '.join(shapes)}"]


def _commit(conditions) -> str | None:
    if conditions.commit is None:
        return None
    return conditions.commit[:10] + (" with uncommitted changes" if conditions.uncommitted_changes else "")


def _rates_table(cells: list[Cell], attachments: dict[tuple[str, str, str], Attachment]) -> Table:
    columns = [
        "cell",
        "status",
        "#real tokens/s",
        "#quartiles",
        "#slot tokens/s",
        "#label tokens/s",
        "#step ms",
        "#steps",
        "#peak allocated GiB",
        "#peak reserved GiB",
        "clocks, power",
        "why not",
    ]
    return Table(columns, [_rates_row(cell, attachments[_key(cell)]) for cell in _by_rate(cells)])


def _rates_row(cell: Cell, attachment: Attachment) -> list[str | Reference]:
    figures = cell.figures if cell.status == "measured" else None
    memory = cell.memory
    return [
        Reference(label_of(cell), attachment),
        STATUS_WORDS[cell.status],
        f"{figures.real_tokens_per_s.median:,.0f}" if figures else NONE,
        _quartiles(figures.real_tokens_per_s) if figures else NONE,
        f"{figures.slot_tokens_per_s.median:,.0f}" if figures else NONE,
        f"{figures.label_tokens_per_s.median:,.0f}" if figures else NONE,
        f"{figures.step_ms.median:,.1f}" if figures else NONE,
        str(figures.timed_steps) if figures else NONE,
        f"{memory.peak_allocated_gib:.1f}" if memory else NONE,
        f"{memory.peak_reserved_gib:.1f}" if memory else NONE,
        _states(cell.conditions.before, cell.conditions.after),
        cell.reason or "",
    ]


def _by_rate(cells: list[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: -(rate_of(cell) or 0.0))


def _quartiles(spread: Spread) -> str:
    return f"{spread.q1:,.0f} to {spread.q3:,.0f}"


def _states(before: GpuState | None, after: GpuState | None) -> str:
    if before is None and after is None:
        return NONE
    parts = []
    for unit, read in (("MHz", "sm_clock_mhz"), ("W", "power_w"), ("°C", "temperature_c")):
        values = [getattr(state, read, None) for state in (before, after)]
        if any(value is not None for value in values):
            parts.append(" → ".join(NONE if value is None else f"{value:.0f}" for value in values) + f" {unit}")
    return ", ".join(parts) or NONE


def _checks_table(cells: list[Cell]) -> Table:
    columns = [
        "cell",
        "#model FLOP utilisation",
        "#hardware",
        "#model TFLOP/s",
        "#peak TFLOP/s",
        "#GEMM measured TFLOP/s",
        "#copy measured TB/s",
        "#share of floor",
        "loss gate",
    ]
    rows = []
    for cell in _by_rate(cells):
        flops, ceilings, gate = cell.flops, cell.ceilings, cell.loss_gate
        rows.append(
            [
                label_of(cell),
                f"{flops.model_utilisation:.1%}" if flops else NONE,
                f"{flops.hardware_utilisation:.1%}" if flops else NONE,
                f"{flops.model_tflops:.4g}" if flops else NONE,
                f"{flops.peak_tflops:.4g}" if flops else NONE,
                f"{ceilings.gemm_tflops:.4g}" if ceilings else NONE,
                f"{ceilings.copy_tb_per_s:.3g}" if ceilings else NONE,
                f"{cell.floor.fraction:.1%}" if cell.floor else NONE,
                _gate(cell) if gate else NONE,
            ]
        )
    return Table(columns, rows)


def _gate(cell: Cell) -> str:
    gate = cell.loss_gate
    verdict = "passed" if gate.passed else "failed"
    return f"{verdict}: off by {gate.largest_difference:.2g}, {gate.allowed:.2g} allowed, from {gate.reference}"


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.session, cell.who, cell.name


def _attachments(cells: list[Cell]) -> dict[tuple[str, str, str], Attachment]:
    """Of every cell its conditions, settings and whole resolved configuration."""
    found: dict[tuple[str, str, str], Attachment] = {}
    for cell in cells:
        if _key(cell) in found:
            raise InputError(
                f"the cell {cell.name!r} of session {cell.session!r} is given twice; name each results directory once"
            )
        shown = cell.model_dump(
            mode="json", include={"name", "who", "session", "status", "reason", "shape", "num_parameters"}
        )
        shown |= cell.model_dump(mode="json", include={"conditions", "settings", "config"})
        text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
        key = _slug(f"{cell.session} {cell.who} {cell.name}")
        found[_key(cell)] = Attachment(key, f"{label_of(cell)} (session {cell.session})", text)
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
