"""Pictures of cells as SVG: throughput with its spread, time by class against the floor, memory against throughput."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from packloop.bench.drawing import BACK, BLUE, GREY, GRID, IDLE, MUTED, ORANGE, TEXT, class_style, drawing, svg_of
from packloop.bench.kernel_classes import CLASSES
from packloop.bench.point_labels import place_labels
from packloop.bench.results import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Labelled = list[tuple[str, Cell]]

_WRAP_AT = 40
# In the plot of points, names longer than this, or of more cells, become numbers with a key.
_LONGEST_NAME, _MOST_NAMES = 26, 16
# A segment narrower than this share of the axis has no number in it.
_NARROW = 0.055


def rates_plot(cells: Labelled, *, title: str, reference: str | None) -> str:
    """Bars of median real tokens/s with their quartiles, the slowest at the bottom; what has no rate says why.

    cells: label and cell. reference: label of the cell that the others' rates are divided by, where there is one.
    """
    ordered = sorted(cells, key=lambda pair: rate_of(pair[1]) or 0.0)
    base = next((rate_of(cell) for label, cell in cells if label == reference), None)
    highest = max((cell.figures.real_tokens_per_s.q3 for _, cell in cells if rate_of(cell)), default=1.0)
    names = _wrapped([label for label, _ in ordered])
    with drawing(1.15 + _row_inches(names, least=0.4) * len(cells)) as (figure, axes):
        for place, (label, cell) in enumerate(ordered):
            if not rate_of(cell):
                words = textwrap.shorten(why_no_rate(cell), 95, placeholder=" ...")
                axes.text(highest * 0.01, place, words, va="center", color=MUTED, style="italic", fontsize=9)
                continue
            rate = cell.figures.real_tokens_per_s
            axes.barh(place, rate.median, height=0.62, color=_whose_color(label, cell, reference))
            spread = [[rate.median - rate.q1], [rate.q3 - rate.median]]
            axes.errorbar(rate.median, place, xerr=spread, color=TEXT, capsize=3, elinewidth=1.2, linestyle="none")
            times = f", {rate_of(cell) / base:.2f}x" if base and label != reference else ""
            axes.text(rate.q3 + highest * 0.015, place, f"{rate.median:,.0f}{times}", va="center", fontsize=9)
        _name_rows(axes, names)
        axes.set_xlim(0, highest * 1.22)
        if any(rate_of(cell) for _, cell in cells):
            axes.set_xlabel("real tokens/s (padding not counted): median, whiskers from first to third quartile")
        else:
            axes.set_xticks([])
        axes.set_title(title, loc="left", fontsize=11)
        _add_whose_legend(figure, cells, reference)
        return svg_of(figure)


def time_plot(cells: Labelled, *, title: str) -> str:
    """Stacked bars of a step's time by class of work, per 1,000 real tokens, each above the bar of its floor.

    cells: measured, each with a profile, a floor or both; without a profile its bar is of one piece.
    """
    ordered = sorted(cells, key=lambda pair: -ms_per_thousand(pair[1], _step_ms(pair[1])))
    longest = max(ms_per_thousand(cell, _step_ms(cell)) for _, cell in cells)
    shown = {name for _, cell in cells for name in pieces_of(cell)}
    names = _wrapped([label for label, _ in ordered])
    with drawing(1.9 + _row_inches(names, least=0.62) * len(cells)) as (figure, axes):
        for place, (_, cell) in enumerate(ordered):
            left = 0.0
            for name, ms in pieces_of(cell).items():
                width = ms_per_thousand(cell, ms)
                _add_segment(axes, place + 0.12, left, width, name, is_wide=width > longest * _NARROW)
                left += width
            axes.text(left + longest * 0.01, place + 0.12, f"{left:.1f}", va="center", fontsize=9)
            if cell.floor:
                floor = ms_per_thousand(cell, cell.floor.ms)
                axes.barh(place - 0.29, floor, height=0.16, color=TEXT)
                words = f"floor {floor:.1f}, {cell.floor.fraction:.0%} of the step"
                axes.text(floor + longest * 0.01, place - 0.29, words, va="center", fontsize=8.5, color=MUTED)
        _name_rows(axes, names)
        axes.set_xlim(0, longest * 1.08)
        axes.set_xlabel("ms per 1,000 real tokens")
        axes.set_title(title, loc="left", fontsize=11)
        handles = [_patch(name) for name in [*CLASSES, IDLE, _ALL] if name in shown]
        if any(cell.floor for _, cell in cells):
            handles.append(_patch("floor: matrix products and attention alone", color=TEXT))
        figure.legend(handles=handles, loc="outside lower left", ncols=5)
        return svg_of(figure)


def memory_plot(cells: Labelled, *, title: str, reference: str | None, capacities: Iterable[tuple[str, float]]) -> str:
    """Median real tokens/s over peak memory, a point a cell, with quartiles and the memory of common GPUs.

    cells: measured, with memory. capacities: name and GiB; those that no cell comes near are not drawn.
    """
    highest = max(cell.figures.real_tokens_per_s.q3 for _, cell in cells)
    most = max(cell.memory.peak_counted_gib for _, cell in cells)
    names = [label for label, _ in sorted(cells, key=lambda pair: -rate_of(pair[1]))]
    has_key = len(names) > _MOST_NAMES or max(map(len, names)) > _LONGEST_NAME
    with drawing(5.6 + (0.18 * math.ceil(len(names) / 2) if has_key else 0)) as (figure, axes):
        for label, cell in cells:
            rate, gib = cell.figures.real_tokens_per_s, cell.memory.peak_counted_gib
            spread = [[rate.median - rate.q1], [rate.q3 - rate.median]]
            color = _whose_color(label, cell, reference)
            axes.errorbar(gib, rate.median, yerr=spread, fmt="o", color=color, markersize=7, capsize=3, elinewidth=1.2)
        axes.set_xlim(0, most * 1.18)
        axes.set_ylim(0, highest * 1.15)
        _add_capacities(axes, [(name, gib) for name, gib in capacities if gib < most * 1.15])
        axes.grid()
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("peak GPU memory, GiB (reserved, and paged optimizer state)")
        axes.set_ylabel("real tokens/s, median and quartiles")
        axes.set_title(title, loc="left", fontsize=11)
        _add_whose_legend(figure, cells, reference)
        if has_key:
            _add_key(figure, names)
        shown = {name: str(number) if has_key else name for number, name in enumerate(names, 1)}
        place_labels(figure, axes, [(c.memory.peak_counted_gib, rate_of(c), shown[label]) for label, c in cells])
        return svg_of(figure)


def _add_capacities(axes: Axes, capacities: list[tuple[str, float]]) -> None:
    """A dotted line with its name for each."""
    for name, gib in capacities:
        axes.axvline(gib, color=MUTED, linewidth=1, linestyle=":")
        beside = {"xycoords": ("data", "axes fraction"), "xytext": (3, -3), "textcoords": "offset points"}
        axes.annotate(name, (gib, 1), rotation=90, va="top", fontsize=8, color=MUTED, **beside)


def _add_key(figure: Figure, names: list[str]) -> None:
    """What the numbers of points stand for, below the plot."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linestyle="none", label=f"{number}: {name}") for number, name in enumerate(names, 1)]
    figure.legend(handles=lines, loc="outside lower left", ncols=2, fontsize=8, handlelength=0, handletextpad=0)


def rate_of(cell: Cell) -> float | None:
    """Median real tokens/s of a cell that was measured; None for any other, whatever figures it has."""
    return cell.figures.real_tokens_per_s.median if cell.status == "measured" and cell.figures else None


def why_no_rate(cell: Cell) -> str:
    """In words, for a cell without a rate."""
    status = {"out_of_memory": "out of memory", "failed": "failed", "wrong": "wrong result"}.get(cell.status)
    return f"{status or 'no figures'}{': ' + cell.reason if cell.reason else ''}"


_ALL = "whole step, not profiled"


def pieces_of(cell: Cell) -> dict[str, float]:
    """Milliseconds of a step by class, idle last."""
    if cell.profile is None:
        return {_ALL: cell.figures.step_ms.median}
    known = cell.profile.by_class_ms
    ordered = {name: known[name] for name in CLASSES if name in known} | known
    return ordered | {IDLE: max(0.0, cell.profile.step_ms - sum(known.values()))}


def _step_ms(cell: Cell) -> float:
    return sum(pieces_of(cell).values())


def ms_per_thousand(cell: Cell, ms: float) -> float:
    """Of a step's milliseconds, those that 1,000 real tokens take."""
    return ms / cell.figures.real_tokens_per_step * 1e3


def _add_segment(axes: Axes, place: float, left: float, width: float, name: str, *, is_wide: bool) -> None:
    color, hatch = _style(name)
    axes.barh(place, width, left=left, height=0.5, color=color, hatch=hatch, edgecolor=_edge(color), linewidth=0.6)
    if is_wide:
        inside = {"ha": "center", "va": "center", "fontsize": 8.5}
        box = {"facecolor": color, "edgecolor": "none", "pad": 1.0} if hatch else None
        axes.text(left + width / 2, place, f"{width:.1f}", color=_on(color), bbox=box, **inside)


def _style(name: str) -> tuple[str, str]:
    return (GREY, "") if name == _ALL else class_style(name)


def _edge(color: str) -> str:
    return MUTED if color == BACK else BACK


def _on(color: str) -> str:
    """Black or white, whichever is told from the colour more easily; the page's own text colour on its background."""
    if color in (BACK, GRID):
        return TEXT
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return "#ffffff" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18 else "#000000"


def _patch(name: str, *, color: str | None = None):
    from matplotlib.patches import Patch

    fill, hatch = (color, "") if color else _style(name)
    return Patch(facecolor=fill, hatch=hatch, edgecolor=_edge(fill), linewidth=0.6, label=name)


def _wrapped(labels: list[str]) -> list[str]:
    return ["\n".join(textwrap.wrap(label.replace(",", ", "), _WRAP_AT)) for label in labels]


def _row_inches(names: list[str], *, least: float) -> float:
    """Room for the name of most lines."""
    return max(least, 0.12 + 0.155 * max(name.count("\n") + 1 for name in names))


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9 if any("\n" in name for name in names) else 10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines["bottom"].set_visible(False)


def _whose_color(label: str, cell: Cell, reference: str | None) -> str:
    return GREY if label == reference else BLUE if cell.who == "packloop" else ORANGE


def _add_whose_legend(figure: Figure, cells: Labelled, reference: str | None) -> None:
    """Where more than one colour is in use."""
    colors = {_whose_color(label, cell, reference) for label, cell in cells if rate_of(cell)}
    names = {BLUE: "packloop", ORANGE: "other trainers", GREY: "the reference"}
    if len(colors) > 1:
        handles = [_patch(name, color=color) for color, name in names.items() if color in colors]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
