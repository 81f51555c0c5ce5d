"""The picture of a profile: a bar for each phase, stacked by class of work, above the bar of its floors."""

from __future__ import annotations

import importlib.util
import io
import re
from typing import TYPE_CHECKING

from packloop.bench.breakdown import PHASES, Part
from packloop.bench.drawing import BACK, IDLE, class_style
from packloop.bench.kernel_classes import CLASSES
from packloop.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_KEY = "time-by-class"
# Centre and height of the two bars of a phase.
_MEASURED, _MEASURED_HEIGHT = -0.08, 0.46
_FLOOR, _FLOOR_HEIGHT = 0.27, 0.2
# A piece of this share of the axis has room for its figure.
_LABELLED = 0.05


def require_matplotlib() -> None:
    """InputError where it is missing, before anything has run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "the plot of a profile needs matplotlib, which is not installed; run: pip install 'packloop[bench]'"
        )


def profile_plot(parts: list[Part], *, idle_ms: float, step_ms: float, title: str) -> tuple[str, bytes]:
    """(SVG, PNG), dark on white. Milliseconds of an average step."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "packloop", "font.family": "DejaVu Sans", "font.size": 10}
    with matplotlib.rc_context(style | {"hatch.linewidth": 0.7, "hatch.color": "#333333"}):
        phases = [phase for phase in PHASES if any(part.phase == phase for part in parts)]
        figure = Figure(figsize=(10.4, 1.9 + 0.8 * (len(phases) + 1)), layout="constrained")
        axes = figure.add_subplot()
        shown: dict[str, object] = {}
        longest = max([idle_ms, *(_total(parts, phase) for phase in phases)])
        for place, phase in enumerate(phases):
            rows = [part for part in parts if part.phase == phase]
            _bar(axes, place, [(part.cls, part.ms) for part in rows], longest, shown)
            floors = [(part.cls, part.floor_ms) for part in rows if part.floor_ms is not None]
            _floor_bar(axes, place, floors)
            _figures(axes, place, _total(parts, phase), step_ms, longest, sum(ms for _, ms in floors))
        _bar(axes, len(phases), [(IDLE, idle_ms)], longest, shown)
        _figures(axes, len(phases), idle_ms, step_ms, longest, None)
        axes.set_yticks([place + _MEASURED for place in range(len(phases) + 1)], [*phases, IDLE])
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 1.2)
        axes.set_xlabel("milliseconds of a step; pale: floor of the classes that have one")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="x", color="#d8dee4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter("{x:,g}")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        order = [cls for cls in (*CLASSES, IDLE) if cls in shown]
        figure.legend([shown[cls] for cls in order], order, loc="outside lower center", ncols=7, frameon=False)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=150)
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Arial, sans-serif").strip(), png.getvalue()


def _style(cls: str) -> tuple[str, str]:
    color, hatch = class_style(cls)
    return "#ffffff" if color == BACK else color, hatch


def _total(parts: list[Part], phase: str) -> float:
    return sum(part.ms for part in parts if part.phase == phase)


def _bar(axes: Axes, place: int, pieces: list[tuple[str, float]], longest: float, shown: dict[str, object]) -> None:
    left = 0.0
    for cls, ms in pieces:
        color, hatch = _style(cls)
        bars = axes.barh(
            place + _MEASURED,
            ms,
            left=left,
            height=_MEASURED_HEIGHT,
            color=color,
            hatch=hatch,
            edgecolor="#333333",
            linewidth=0.4,
        )
        shown.setdefault(cls, bars[0])
        if ms > _LABELLED * longest:
            plain = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
            axes.text(left + ms / 2, place + _MEASURED, _ms(ms), ha="center", va="center", fontsize=8, bbox=plain)
        left += ms


def _floor_bar(axes: Axes, place: int, pieces: list[tuple[str, float]]) -> None:
    left = 0.0
    for cls, ms in pieces:
        color, hatch = _style(cls)
        axes.barh(
            place + _FLOOR, ms, left=left, height=_FLOOR_HEIGHT, color=color, hatch=hatch, alpha=0.45, linewidth=0
        )
        left += ms


def _figures(axes: Axes, place: int, ms: float, step_ms: float, longest: float, floor_ms: float | None) -> None:
    gap = longest * 0.01
    share = ms / step_ms
    words = f"{_ms(ms)} ms, {share:.0%}" if share >= 0.01 else f"{_ms(ms)} ms, {share:.1%}"
    axes.text(ms + gap, place + _MEASURED, words, va="center", fontsize=9)
    if floor_ms:
        axes.text(floor_ms + gap, place + _FLOOR, f"floor {_ms(floor_ms)}", va="center", fontsize=8, color="#57606a")


def _ms(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:,.3g}"
