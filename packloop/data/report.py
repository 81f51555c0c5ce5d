"""What `packloop data stats` and `packloop data preview` show: pure functions from data to rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from packloop.data.packing import Packing, Packs, epoch_packs
from packloop.data.prefix import CommonPrefix
from packloop.data.sources import SkippedRow
from packloop.errors import ConfigError

if TYPE_CHECKING:
    from packloop.config import DataConfig
    from packloop.data.loader import TrainingData
    from packloop.data.tokenize import Documents, TokenizeReport

BAR = "█"
HISTOGRAM_BINS = 12
HISTOGRAM_COLUMNS = 44
PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)
ROWS_NAMED = 5

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL_PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 65533)


def count_labels(documents: Documents, packs: Packs, packing: Packing) -> int:
    """Targets that count in one epoch: tokens that count, less those with nothing before them to predict them from."""
    if not packs.num_packs:
        return 0
    first_segment = packs.pack_offsets[:-1] if packing == "wrapped" else np.arange(len(packs.segment_document))
    first_token = documents.offsets[packs.segment_document[first_segment]] + packs.segment_start[first_segment]
    return int(documents.counts.sum()) - int(documents.counts[first_token].sum())


def render_stats(data: TrainingData, config: DataConfig, *, seed: int) -> RenderableType:
    """Rows, lengths, packs, fill, and what was cut or left out and why, for the training and the held-out rows."""
    packs, _ = epoch_packs(
        data.train.lengths, config.packing, config.max_length, seed=seed, epoch=0, shuffle=config.shuffle
    )
    parts = [
        Text.assemble(
            (str(config.source), "bold"),
            f"  template {data.template.name}, packing {config.packing}, max_length {config.max_length:,}, "
            f"loss on {'all tokens' if config.loss_on == 'all' else 'the response'}",
        ),
        Text(),
        _summary(data.train, data.report, data.train_rows.skipped, packs, config),
        Text(),
        Text("Tokens a document", style="bold"),
        *_histogram(data.train.lengths),
        Text(_percentiles(data.train.lengths), style="dim"),
    ]
    if data.eval is not None:
        held_out_packs, _ = epoch_packs(
            data.eval.lengths, config.packing, config.max_length, seed=seed, epoch=0, shuffle=False
        )
        parts += [
            Text(),
            Text("Held out", style="bold"),
            _summary(data.eval, data.eval_report, data.eval_rows.skipped, held_out_packs, config),
        ]
    return Group(*parts)


def render_preview(
    data: TrainingData, config: DataConfig, tokenizer: Any, *, seed: int, pack: int = 0
) -> RenderableType:
    """Row number `pack` of the first epoch: where each document begins, and which of its tokens count.

    Tokens that count are green, others dim; where there is no colour, ⟦ ⟧ encloses what counts.
    """
    packs, order = epoch_packs(
        data.train.lengths, config.packing, config.max_length, seed=seed, epoch=0, shuffle=config.shuffle
    )
    if pack >= len(order):
        raise ConfigError(
            f"pack {pack}: the first epoch has {len(order)} packs; give a number from 0 to {len(order) - 1}"
        )
    chosen = order[pack]
    segments = range(packs.pack_offsets[chosen], packs.pack_offsets[chosen + 1])
    num_tokens = int(packs.pack_tokens[chosen])
    num_slots = num_tokens if config.packing == "none" else config.max_length
    attends = "documents attend across their borders" if config.packing == "wrapped" else "documents are kept apart"
    parts: list[RenderableType] = []
    num_labels = 0
    for place, segment in enumerate(segments):
        document = int(packs.segment_document[segment])
        start, stop = int(packs.segment_start[segment]), int(packs.segment_stop[segment])
        begin = int(data.train.offsets[document])
        token_ids = data.train.token_ids[begin + start : begin + stop].tolist()
        counts = data.train.counts[begin + start : begin + stop].copy()
        if place == 0 or config.packing != "wrapped":
            counts[0] = False
        num_labels += int(counts.sum())
        length = int(data.train.lengths[document])
        part = "" if stop - start == length else f", tokens {start:,} to {stop - 1:,} of {length:,}"
        parts.append(
            Text(
                f"── document {place}: row {data.train.row_ids[document]}{part}, {stop - start:,} tokens, "
                f"{int(counts.sum()):,} count",
                style="bold cyan",
            )
        )
        parts.append(_token_text(tokenizer, token_ids, counts))
    padding = num_slots - num_tokens
    if padding:
        parts.append(Text(f"── padding: {padding:,} slots, none counts", style="bold cyan"))
    title = Text.assemble(
        (f"pack {pack} of {len(order):,}", "bold"),
        f"  {num_slots:,} slots, {num_tokens:,} tokens, {num_labels:,} count; {config.packing}: {attends}\n",
        ("⟦green⟧ counts in the loss", "green"),
        ", ",
        ("dim does not", "dim"),
    )
    return Group(title, Text(), *parts)


def _summary(
    documents: Documents, report: TokenizeReport, skipped: Sequence[SkippedRow], packs: Packs, config: DataConfig
) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_column(style="dim", overflow="fold")

    def line(number: int, noun: str, remark: str = "", *, became: str = "") -> None:
        what = f"{noun}{'' if number == 1 else 's'} {became}".rstrip()
        table.add_row(f"{number:,}", what, Text(_printable(remark)))

    num_slots = int(packs.pack_tokens.sum()) if config.packing == "none" else packs.num_packs * config.max_length
    num_labels = count_labels(documents, packs, config.packing)
    line(report.num_rows, "row")
    for reason, rows in _by_reason(skipped).items():
        line(len(rows), "row", f"{reason} ({_named(rows)})", became="skipped")
    for reason, rows in report.dropped_row_ids.items():
        line(len(rows), "document", f"{reason} ({_named(rows)})", became="dropped")
    if report.tokens_dropped:
        line(report.tokens_dropped, "token", "with those documents", became="dropped")
    if report.num_truncated:
        line(
            report.num_truncated,
            "row",
            f"{report.tokens_truncated:,} tokens past max_length cut off",
            became="truncated",
        )
    if report.num_split:
        line(
            report.num_split,
            "row",
            f"{report.label_tokens_lost_to_split:,} label tokens begin a later piece and are not predicted",
            became="split",
        )
    line(report.num_documents, "document", f"{report.num_tokens:,} tokens")
    line(num_labels, "label token", f"{num_labels / max(1, report.num_tokens):.1%} of the tokens")
    common = CommonPrefix.of(documents)
    if common.length and config.packing != "wrapped":
        sharing = int(common.has_it.sum())
        share = common.length * (sharing - 1) / report.num_tokens
        remark = f"begin {sharing:,} documents; computed once a micro-batch on a GPU, {share:.1%} at most left out"
        line(common.length, "token", remark, became="in common")
    fill = "one document each" if config.packing == "none" else f"{report.num_tokens / max(1, num_slots):.2%} full"
    line(packs.num_packs, "pack", fill)
    return table


def _by_reason(skipped: Sequence[SkippedRow]) -> dict[str, list[int]]:
    # The text after a bracket or a number differs from row to row; what precedes it is the kind of fault.
    rows: dict[str, list[int]] = {}
    for row in skipped:
        rows.setdefault(row.reason.partition(" (")[0], []).append(row.index)
    return rows


def _named(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - ROWS_NAMED:,} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:ROWS_NAMED]))}{more}"


def _histogram(lengths: np.ndarray) -> list[Text]:
    """Bars of documents by length, in bins of a round width."""
    width = _round_up(max(1, int(np.ceil((lengths.max() + 1) / HISTOGRAM_BINS))))
    counts = np.bincount(lengths // width)
    lines = []
    for index, count in enumerate(counts.tolist()):
        columns = round(count / counts.max() * HISTOGRAM_COLUMNS)
        label = f"{index * width:>6,} to {(index + 1) * width - 1:>6,}  "
        # A bin that holds anything shows something.
        lines.append(Text.assemble((label, "dim"), (BAR * max(columns, 1 if count else 0), "green"), f" {count:,}"))
    return lines


def _round_up(width: int) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is at least `width`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= width:
                return digit * power
        power *= 10


def _percentiles(lengths: np.ndarray) -> str:
    values = np.percentile(lengths, PERCENTILES, method="lower").astype(int)
    names = {0: "min", 50: "median", 100: "max"}
    shown = [f"{names.get(percent, f'{percent} %')} {value:,}" for percent, value in zip(PERCENTILES, values)]
    return f"mean {lengths.mean():,.1f}, " + ", ".join(shown)


def _token_text(tokenizer: Any, token_ids: list[int], counts: np.ndarray) -> Text:
    """Tokens as text in runs of those that count and those that do not; BOS and EOS by name."""
    text = Text(overflow="fold")
    begin = 0
    while begin < len(token_ids):
        end = begin
        while end < len(token_ids) and counts[end] == counts[begin]:
            end += 1
        # Decoded from the document's start, so that no run loses the space that it begins with.
        before = _decoded(tokenizer, token_ids[:begin])
        run = _decoded(tokenizer, token_ids[:end])[len(before) :]
        run = _printable(run)
        text.append(f"⟦{run}⟧" if counts[begin] else run, style="green" if counts[begin] else "dim")
        begin = end
    return text


def _decoded(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _printable(text: str) -> str:
    """`text` with its control characters as pictures, so that no row can steer the terminal."""
    return text.translate(_CONTROL_PICTURES)
