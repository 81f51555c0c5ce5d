"""The report on cost: every measured cell on every instance, the tutorial's own rows, and the rule's error."""

from __future__ import annotations

from urllib.parse import urlsplit

from packloop.bench.cell_tables import NONE, STATUS_WORDS, by_rate, label_of
from packloop.bench.cost import (
    MEASURED,
    PROJECTED,
    TUTORIAL_DATA,
    TUTORIAL_TOKENS_PER_ROW,
    DataSet,
    Estimate,
    estimate,
    scale_between,
    slowdown,
    splits_of,
)
from packloop.bench.document import Block, Bullets, Entry, Heading, Link, Paragraph, Table
from packloop.bench.groups import attention_of, batch_of
from packloop.bench.plots import rate_of
from packloop.bench.prices import Instance
from packloop.bench.results import Ceilings, Cell
from packloop.bench.tutorial import INSTANCE, PUBLISHED, is_stock, other_job, trains_like
from packloop.engine.budget import CONTEXT_GIB
from packloop.gpus import find_gpu


def cost_introduction(instances: list[Instance], data: DataSet) -> list[Block]:
    """What all sessions' costs are for, by which rule, and at which prices."""
    is_estimate = data.tokens_per_row == TUTORIAL_DATA.tokens_per_row
    basis = f" {data.tokens_per_row:g} is {TUTORIAL_TOKENS_PER_ROW}." if is_estimate else ""
    return [
        Heading("Cost"),
        Paragraph(
            f"For {data.rows:,} rows x {data.epochs:g} epochs x {data.tokens_per_row:g} real tokens a row = "
            f"{data.tokens / 1e6:.2f} million tokens; loading, evaluation and checkpoints are not counted.{basis}"
        ),
        Bullets(
            [
                f"`{MEASURED}`: the data set's tokens at the cell's median rate.",
                f"`{PROJECTED}`: the step's arithmetic x the ratio of bf16 rates, its traffic x that of bandwidths, "
                "idle time as it is. Arithmetic is base GEMM and attention (not eager's) by the profile; without one, "
                "the executed FLOPs at the GEMM rate measured here. All settings stay the cell's.",
                f"Out of memory: the cell's peak and {CONTEXT_GIB:g} GiB for CUDA's context against the GPU's memory.",
                "On a machine with several GPUs, dollars are one GPU's share, as if the others were used as well.",
            ]
        ),
        _instances_table(instances),
    ]


def cost_blocks(
    session: str, cells: list[Cell], instances: list[Instance], data: DataSet, measured: dict[str, Ceilings]
) -> list[Block]:
    """Of one session's cells. measured: of all results, as `measured_ceilings` gives it."""
    heading = Heading(f"Cost, session {session}", 3)
    rated = [cell for cell in by_rate(cells) if rate_of(cell)]
    if not rated:
        return [heading, Paragraph("No cell has a rate, so none has a cost.")]
    device = rated[0].conditions.device
    if find_gpu(device) is None:
        return [heading, Paragraph(f"{device} is not in the GPU table: its rates say nothing of an instance's.")]
    blocks: list[Block] = [heading]
    scales = _scales(rated[0], instances, measured)
    for basis in (MEASURED, PROJECTED):
        columns = [one for one in instances if _basis(rated[0], one) == basis]
        if columns:
            blocks.append(Paragraph(f"Time and dollars, {basis}:"))
            blocks.append(_cost_table(rated, columns, data, measured))
            if basis == PROJECTED and scales:
                blocks.append(Bullets(scales))
    missing = [f"{label_of(cell)} ({STATUS_WORDS[cell.status]})" for cell in cells if not rate_of(cell)]
    if missing:
        blocks.append(Paragraph(f"Without a rate, and so without a cost: {', '.join(missing)}."))
    return blocks + _tutorial_blocks(rated, instances, measured)


def _basis(cell: Cell, instance: Instance) -> str:
    own = find_gpu(cell.conditions.device)
    return MEASURED if own is not None and own.key == instance.gpu else PROJECTED


def _scales(cell: Cell, instances: list[Instance], measured: dict[str, Ceilings]) -> list[str]:
    own = find_gpu(cell.conditions.device)
    lines = []
    for gpu in {one.gpu: one.model for one in instances if own is not None and one.gpu != own.key}.values():
        if gpu.bf16_tflops is not None and own.bf16_tflops is not None:
            scale = scale_between(own, gpu, measured)
            factors = f"arithmetic x {scale.compute:.2f}, traffic x {scale.memory:.2f}"
            lines.append(f"{own.key} to {gpu.key}: {factors} (by {scale.source})")
    return lines


def _instances_table(instances: list[Instance]) -> Table:
    columns = ["instance", "where", "GPUs", "#$ an hour", "#$ a GPU-hour", "price of", "source"]
    rows: list[list[Entry]] = []
    for one in instances:
        hour, share = f"{one.dollars_per_hour:.3f}", f"{one.dollars_per_gpu_hour:.3f}"
        source = Link(urlsplit(one.source).netloc, one.source) if "://" in one.source else one.source
        rows.append([one.name, one.where, f"{one.gpus} x {one.gpu}", hour, share, one.date, source])
    return Table(columns, rows)


def _cost_table(cells: list[Cell], instances: list[Instance], data: DataSet, measured: dict[str, Ceilings]) -> Table:
    columns = ["cell", *(f"#{one.name}, {one.gpu}" for one in instances)]
    rows: list[list[Entry]] = []
    for cell in cells:
        shown = [_shown(estimate(cell, one, data, measured)) for one in instances]
        rows.append([label_of(cell), *shown])
    return Table(columns, rows)


def _shown(one: Estimate) -> str:
    if one.seconds is None or one.dollars is None:
        return one.reason or NONE
    return f"{hours(one.seconds)}, ${one.dollars:.2f}"


def hours(seconds: float) -> str:
    """`2:08 h` from an hour on, else minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{seconds / 60:.1f} min"


def _tutorial_blocks(cells: list[Cell], instances: list[Instance], measured: dict[str, Ceilings]) -> list[Block]:
    """The tutorial's job on its own instance, published and ours; nothing where that instance is not priced."""
    instance = next((one for one in instances if one.name == INSTANCE), None)
    left_out = [f"{label_of(cell)} ({reason})" for cell in cells if (reason := other_job(cell)) is not None]
    cells = [cell for cell in cells if other_job(cell) is None]
    if instance is None or not cells:
        return []
    rows: list[list[Entry]] = []
    for run in PUBLISHED:
        dollars = f"${run.dollars:g} as published, ${run.dollars_at_its_price:.2f} at its own price"
        rows.append([run.name, run.attention, str(run.batch), hours(run.seconds), dollars, "published"])
    for cell in cells:
        one = estimate(cell, instance, TUTORIAL_DATA, measured)
        time, dollars = (hours(one.seconds), f"${one.dollars:.2f}") if one.seconds else (NONE, one.reason or NONE)
        rows.append([label_of(cell), attention_of(cell) or NONE, str(batch_of(cell) or NONE), time, dollars, one.basis])
    columns = ["run", "attention", "#batch", "#time", "#dollars", "basis"]
    blocks: list[Block] = [
        Heading("Beside the tutorial", 4),
        Paragraph(
            f"The tutorial's job ({TUTORIAL_DATA.tokens / 1e6:.2f} million tokens) on its instance, {INSTANCE}. Its "
            "3:08 to 2:08 changes two things at once: flash attention, and with it the batch from 4 to 6."
        ),
        Table(columns, rows),
    ]
    if left_out:
        blocks.append(Paragraph(f"Not beside it, as they train something else: {', '.join(left_out)}."))
    apart = _changes_apart(cells)
    if apart:
        blocks.append(Paragraph(apart))
    return blocks + _error_blocks(cells, instance, measured)


def _changes_apart(cells: list[Cell]) -> str | None:
    """Attention at one batch, and the batch with one attention, of the stock cells that were measured here."""
    stock = {(attention_of(cell), batch_of(cell)): rate_of(cell) for cell in cells if is_stock(cell)}
    flash = next((name for name in PUBLISHED[1].attentions if (name, 4) in stock), None)
    if flash is None or ("eager", 4) not in stock:
        return None
    words = f"Apart, on this GPU: flash attention at batch 4 is {stock[flash, 4] / stock['eager', 4]:.2f}x eager"
    if (flash, 6) in stock:
        words += f", and batch 6 another {stock[flash, 6] / stock[flash, 4]:.2f}x"
    return f"{words}."


def _error_blocks(cells: list[Cell], instance: Instance, measured: dict[str, Ceilings]) -> list[Block]:
    """The rule against what can be checked: the tutorial's published times, by cells that train as it did."""
    rows: list[list[Entry]] = []
    for run in PUBLISHED:
        for cell in cells:
            own = find_gpu(cell.conditions.device)
            if own is None or own.key == instance.gpu or not trains_like(cell, run):
                continue
            here_seconds = TUTORIAL_DATA.tokens / rate_of(cell)
            for split in splits_of(cell):
                seconds = here_seconds * slowdown(split, scale_between(own, instance.model, measured))
                error = f"{seconds / run.seconds - 1:+.0%}"
                rows.append([run.name, hours(run.seconds), label_of(cell), split.source, hours(seconds), error])
    if not rows:
        return [
            Paragraph("No cell here trains as the tutorial did, so the rule's error is not checked in this session.")
        ]
    columns = ["published", "#time", "projected from", "split by", "#time", "#error"]
    return [
        Paragraph(
            "What can be checked of the rule: the tutorial's published times against those projected from cells with "
            "its settings. The error is also its software's, of 2023, and its estimated tokens' (standard error 7 %)."
        ),
        Table(columns, rows),
    ]
