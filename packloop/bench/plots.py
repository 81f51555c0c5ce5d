"""Pictures of cells as SVG: throughput with its spread, time by class against the floor, memory against throughput."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from packloop.bench.results import Cell
from packloop.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn with, then replaced: by what the page says of text, muted text, grid lines and its background.
_TEXT, _MUTED, _GRID, _BACK = "#010203", "#010204", "#010205", "#010206"
_IN_A_PAGE = {_TEXT: "currentColor", _MUTED: "var(--muted)", _GRID: "var(--grid)", _BACK: "var(--back)"}
_ON_WHITE = {"currentColor": "#1b1f24", "var(--muted)": "#57606a", "var(--grid)": "#d8dee4", "var(--back)": "#ffffff"}

# Okabe and Ito's colours, told apart with every common kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW, GREY = "#56b4e9", "#cc79a7", "#f0e442", "#8b949e"
# Class of work -> colour and hatching. Where a colour serves twice, the hatching tells.
_CLASS_STYLES = {
    "gemm": (BLUE, ""),
    "attention": (ORANGE, ""),
    "nf4 dequantisation": (VERMILION, ""),
    "dropout + lora": (GREEN, ""),
    "norm": (PURPLE, ""),
    "rope": (YELLOW, ""),
    "activation": (SKY, ""),
    "head + loss": (BLUE, "////"),
    "optimizer": (ORANGE, "////"),
    "copies": (PURPLE, "////"),
    "collectives": (GREEN, "////"),
    "other elementwise": (GREY, ""),
    "idle": ("none", "...."),
}
_SPARE_STYLES = ((SKY, "////"), (VERMILION, "////"), (YELLOW, "////"), (GREY, "////"))

WIDTH_INCHES = 9.6


@contextmanager
def _drawing(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure with one pair of axes. InputError where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "the plots of a report need matplotlib, which is not installed; run: pip install 'packloop[bench]'"
        ) from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "packloop",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _GRID,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _TEXT,
        "ytick.labelcolor": _TEXT,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "hatch.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """For a page: no prologue, colours of text and lines left to the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for drawn, meant in _IN_A_PAGE.items():
        text = text.replace(drawn, meant)
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Arial, sans-serif").strip()


def standalone(svg: str) -> str:
    """The same as a file of its own: dark on white wherever it is shown."""
    for meant, color in _ON_WHITE.items():
        svg = svg.replace(meant, color)
    return re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1) + "\n"


def rates_plot(cells: list[tuple[str, Cell]], *, title: str, reference: str | None) -> str:
    """Bars of median real tokens/s with their quartiles, the slowest at the bottom; what has no rate says why.

    cells: label and cell. reference: label of the cell that the others' rates are divided by, where there is one.
    """
    ordered = sorted(cells, key=lambda pair: rate_of(pair[1]) or 0.0)
    base = next((rate_of(cell) for label, cell in cells if label == reference), None)
    highest = max((cell.figures.real_tokens_per_s.q3 for _, cell in cells if rate_of(cell)), default=1.0)
    with _drawing(1.15 + 0.4 * len(cells)) as (figure, axes):
        for place, (label, cell) in enumerate(ordered):
            if not rate_of(cell):
                axes.text(
                    highest * 0.01, place, _why_no_rate(cell), va="center", color=_MUTED, style="italic", fontsize=9
                )
                continue
            rate = cell.figures.real_tokens_per_s
            color = GREY if label == reference else BLUE if cell.who == "packloop" else ORANGE
            axes.barh(place, rate.median, height=0.62, color=color)
            below, above = rate.median - rate.q1, rate.q3 - rate.median
            axes.errorbar(
                rate.median, place, xerr=[[below], [above]], color=_TEXT, capsize=3, elinewidth=1.2, linestyle="none"
            )
            times = f"   {rate_of(cell) / base:.2f}x" if base and label != reference else ""
            axes.text(rate.q3 + highest * 0.015, place, f"{rate.median:,.0f}{times}", va="center", fontsize=9)
        axes.set_yticks(range(len(ordered)), [_wrapped(label) for label, _ in ordered])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.set_xlim(0, highest * 1.22)
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("real tokens/s (padding not counted): median, whiskers from first to third quartile")
        axes.set_title(title, loc="left", fontsize=11)
        return _svg(figure)


def rate_of(cell: Cell) -> float | None:
    """Median real tokens/s of a cell that was measured; None for any other, whatever figures it has."""
    return cell.figures.real_tokens_per_s.median if cell.status == "measured" and cell.figures else None


def _why_no_rate(cell: Cell) -> str:
    status = {"out_of_memory": "out of memory", "failed": "failed", "wrong": "wrong result"}.get(cell.status)
    return f"{status or 'no figures'}{': ' + textwrap.shorten(cell.reason, 90) if cell.reason else ''}"


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 34))
