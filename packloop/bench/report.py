"""`packloop bench report`: results directories -> report.md and report.html, every row with its conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

import packloop.bench.session as sessions
from packloop.bench.cell_tables import (
    STATUS_WORDS,
    Attachments,
    checks_table,
    key_of,
    label_of,
    rates_table,
    ratios_table,
    shared_words,
    time_table,
)
from packloop.bench.cost import TUTORIAL_DATA, DataSet, measured_ceilings
from packloop.bench.cost_section import cost_blocks, cost_introduction
from packloop.bench.document import (
    Attachment,
    Block,
    Bullets,
    Document,
    Heading,
    Paragraph,
    Picture,
    write_document,
)
from packloop.bench.groups import Group, chosen_by_auto, groups_of, reference_of
from packloop.bench.output import require_writable
from packloop.bench.plots import memory_plot, rate_of, rates_plot, time_plot
from packloop.bench.prices import Instance, load_prices
from packloop.bench.results import Cell, Conditions, load_cells
from packloop.errors import ConfigError, InputError
from packloop.gpus import require_gpu

_HOW_TO_READ = [
    "Rates are in real tokens/s: padding is not counted, and a beginning that documents share counts in each of them. "
    "Slots are those computed, labels the tokens trained on.",
    "A rate is the median of the timed steps, and its spread goes from their first to their third quartile.",
    "Cells of one session ran beside each other. Cells of different sessions are never in one chart.",
    "Out of memory, failed and wrong are results too: rows and charts say the reason.",
    "A cell's name leads to its conditions, settings and whole configuration.",
]
# What a directory holds that may be written to though it is not empty: an earlier report, or results.
_OURS = ("report.md", "matrix.json", "cells")
# GPUs whose memory is drawn beside the cells': what they are called, and their key in the table of GPUs.
_CAPACITIES = (("A10G", "a10g"), ("A100 40 GB", "a100-40gb"), ("A100, H100 80 GB", "h100"))


def write_report(
    directories: Sequence[Path],
    output: Path,
    *,
    data: DataSet = TUTORIAL_DATA,
    prices: Path | None = None,
    instances: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Writes the report of all directories; returns the paths of its Markdown and its page.

    data: what costs are for. prices: a file of one's own; instances: those of it to show, all without names.
    """
    require_writable(output)
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in _OURS):
        raise InputError(
            f"--output {str(output)!r} is not empty and holds neither report nor results; give a new directory"
        )
    priced = load_prices(prices, instances)
    document = build_report(gather_cells(directories), priced, data, unmeasured_cells(directories))
    output.mkdir(parents=True, exist_ok=True)
    return write_document(document, output)


def gather_cells(directories: Sequence[Path]) -> list[Cell]:
    """The cells of all directories, each read once. InputError where one is missing or has none."""
    cells: list[Cell] = []
    for directory in dict.fromkeys(path.resolve() for path in directories):
        if not directory.is_dir():
            raise ConfigError(f"results {str(directory)!r}: no such directory; `packloop bench run` writes one")
        cells.extend(load_cells(directory))
    return cells


def unmeasured_cells(directories: Sequence[Path]) -> dict[str, list[str]]:
    """Of each session that stopped before its matrix's end, the cells that it has no result of."""
    found = {}
    for directory in directories:
        if (directory / "matrix.json").exists():  # what compares with other trainers has none
            measured = {cell.name for cell in load_cells(directory)}
            names = [cell.name for cell in sessions.load_plan(directory).cells if cell.name not in measured]
            if names:
                found[sessions.session_of(directory)] = names
    return found


def build_report(
    cells: list[Cell],
    instances: list[Instance],
    data: DataSet = TUTORIAL_DATA,
    unmeasured: Mapping[str, list[str]] = MappingProxyType({}),
) -> Document:
    """The whole report, not yet written anywhere. unmeasured: names of a session's cells without a result."""
    document = Document("Benchmark report")
    document.add(Paragraph(_summary(cells)), Bullets(_HOW_TO_READ))
    attachments, measured = _attachments(cells), measured_ceilings(cells)
    of_session = {name: [cell for cell in cells if cell.session == name] for name in _sessions(cells)}
    for session, members in of_session.items():
        _add_session(document, session, members, attachments, unmeasured.get(session, []))
    document.add(*cost_introduction(instances, data))
    for session, members in of_session.items():
        document.add(*cost_blocks(session, members, instances, data, measured))
    document.add(Heading("Conditions and configuration of every row"), *attachments.values())
    return document


def _summary(cells: list[Cell]) -> str:
    counts = [(words, sum(cell.status == status for cell in cells)) for status, words in STATUS_WORDS.items()]
    shown = ", ".join(f"{count} {words}" for words, count in counts if count)
    sessions = len(_sessions(cells))
    return f"{_counted(len(cells), 'cell')} in {_counted(sessions, 'session')}: {shown}."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sessions(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.session for cell in cells))


def _add_session(
    document: Document, session: str, cells: list[Cell], attachments: Attachments, unmeasured: list[str]
) -> None:
    facts = _shared_conditions(cells)
    if unmeasured:
        count = f"{len(unmeasured)} of the matrix's {len(unmeasured) + len(cells)} cells"
        facts.append(f"not measured yet, {count}: {', '.join(unmeasured)}")
    document.add(Heading(f"Session {session}"), Bullets(facts))
    groups = groups_of(cells)
    for group in groups:
        document.add(_rates_picture(session, group))
    document.add(Heading("Throughput and memory", 3), rates_table(cells, attachments))
    if shared := shared_words(cells):
        document.add(Bullets(shared))
    ratios = ratios_table(cells, groups)
    if ratios:
        document.add(Heading("Against the reference", 3), ratios)
    for shape in dict.fromkeys(cell.shape for cell in cells):
        document.add(*_breakdown_pictures(session, shape, [cell for cell in cells if cell.shape == shape]))
    document.add(Heading("Utilisation, checks and clocks", 3), checks_table(cells))
    sources = dict.fromkeys(cell.flops.peak_source for cell in cells if cell.flops)
    if sources:
        document.add(Paragraph(f"The peak that utilisation is of: {'; '.join(sources)}."))


def _rates_picture(session: str, group: Group) -> Picture:
    reference = reference_of(group.cells)
    svg = rates_plot(_labelled(group.cells), title=group.title, reference=label_of(reference) if reference else None)
    caption = f"{group.rule} The factor is against {label_of(reference)}." if reference else group.rule
    return Picture(_slug(f"{session} rates {group.title}"), f"Real tokens/s, {group.title}", svg, caption)


def _breakdown_pictures(session: str, shape: str, cells: list[Cell]) -> list[Block]:
    """Of what the cells have: where the time goes, and memory against throughput."""
    found: list[Block] = []
    timed = [cell for cell in cells if rate_of(cell) and (cell.profile or cell.floor)]
    if timed:
        title = f"{shape}, time of a step by class of work"
        caption = (
            "Longer is slower; cells of any batch compare. The thin bar is the floor: the step's matrix products, "
            "without recomputation, and its attention, as fast as they go alone on this device."
        )
        svg = time_plot(_labelled(timed), title=title)
        found.append(Heading(f"Where the time goes, {shape}", 3))
        found.append(Picture(_slug(f"{session} {title}"), title, svg, caption))
        profiled = [cell for cell in timed if cell.profile]
        if profiled:
            found += [Paragraph("The same in figures, ms per 1,000 real tokens:"), time_table(profiled)]
    with_memory = [cell for cell in cells if rate_of(cell) and cell.memory]
    if len(with_memory) > 1:
        title = f"{shape}, throughput against memory"
        reference = reference_of(with_memory)
        capacities = [(name, require_gpu(key).memory_gib) for name, key in _CAPACITIES]
        svg = memory_plot(
            _labelled(with_memory),
            title=title,
            reference=label_of(reference) if reference else None,
            capacities=capacities,
        )
        caption = "Up and to the left is better. Dotted lines are the memory of GPUs that this would have to fit into."
        found += [
            Heading(f"Memory and throughput, {shape}", 3),
            Picture(_slug(f"{session} {title}"), title, svg, caption),
        ]
    return found


def _labelled(cells: list[Cell]) -> list[tuple[str, Cell]]:
    return [(label_of(cell), cell) for cell in cells]


def _shared_conditions(cells: list[Cell]) -> list[str]:
    """What the cells of a session ran under; where they differ, all values that occur."""
    conditions = [cell.conditions for cell in cells]

    def values(read: Callable[[Conditions], Any]) -> str:
        return " / ".join(dict.fromkeys(str(read(one)) for one in conditions if read(one) is not None)) or "unknown"

    memory = f", {values(lambda one: one.device_memory_gib)} GiB" if conditions[0].device_memory_gib else ""
    lines = [f"device: {values(lambda one: one.device)}{memory}"]
    if any(one.driver or one.cuda for one in conditions):
        limit = values(lambda one: one.before.power_limit_w if one.before else None)
        lines.append(
            f"driver {values(lambda one: one.driver)}, CUDA {values(lambda one: one.cuda)}, power limit {limit} W"
        )
    packages = sorted({name for one in conditions for name in one.versions})
    versions = [f"{name} {values(lambda one, name=name: one.versions.get(name))}" for name in packages]
    return [
        *lines,
        f"Python {values(lambda one: one.python)}, {', '.join(versions)}",
        f"commit {values(_commit)}, {values(lambda one: one.date)}",
        f"model shape: {' / '.join(dict.fromkeys(cell.shape for cell in cells))}",
    ]


def _commit(conditions: Conditions) -> str | None:
    if conditions.commit is None:
        return None
    return conditions.commit[:10] + (" with uncommitted changes" if conditions.uncommitted_changes else "")


def _attachments(cells: list[Cell]) -> Attachments:
    """Of every cell its conditions, settings and whole resolved configuration. InputError for the same cell twice."""
    found: Attachments = {}
    for cell in cells:
        if key_of(cell) in found:
            raise InputError(
                f"the cell {cell.name!r} of session {cell.session!r} is given twice; name each results directory once"
            )
        what = cell.model_dump(mode="json", exclude={"figures": {"step_ms_all", "losses"}, "asked": True})
        if cell.asked is not None:
            what["chosen_by_auto"] = chosen_by_auto(cell)
        first = {key: what.pop(key) for key in ("name", "who", "session", "status", "reason", "shape", "conditions")}
        text = yaml.safe_dump(first | what, sort_keys=False, allow_unicode=True)
        key = _slug(f"{cell.session} {cell.who} {cell.name}")
        found[key_of(cell)] = Attachment(key, f"{label_of(cell)} (session {cell.session})", text)
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
