"""What all pictures share: one style, colours that everyone can tell apart, and SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from packloop.bench.kernel_classes import CLASSES
from packloop.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn with, then replaced: by what the page says of text, muted text, grid lines and its background.
TEXT, MUTED, GRID, BACK = "#010203", "#010204", "#010205", "#010206"
_IN_A_PAGE = {TEXT: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", BACK: "var(--back)"}
_ON_WHITE = {"currentColor": "#1b1f24", "var(--muted)": "#57606a", "var(--grid)": "#d8dee4", "var(--back)": "#ffffff"}

# Okabe and Ito's colours, told apart with every common kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW, GREY = "#56b4e9", "#cc79a7", "#f0e442", "#8b949e"
# Colour and hatching of the classes of work, in their order. Where a colour serves twice, the hatching tells.
_STYLES = (
    (BLUE, ""),
    (ORANGE, ""),
    (VERMILION, ""),
    (GREEN, ""),
    (PURPLE, ""),
    (YELLOW, ""),
    (SKY, ""),
    (BLUE, "////"),
    (ORANGE, "////"),
    (PURPLE, "////"),
    (GREEN, "////"),
    (GREY, ""),
)
IDLE = "idle"

WIDTH_INCHES = 9.6


def class_style(name: str) -> tuple[str, str]:
    """Colour and hatching of a class of work; of one that is not known, those of `other`."""
    if name == IDLE:
        return BACK, "...."
    return _STYLES[CLASSES.index(name)] if name in CLASSES else _STYLES[-1]


@contextmanager
def drawing(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
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
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": GRID,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "hatch.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, figure.add_subplot()


def svg_of(figure: Figure) -> str:
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
