"""Names beside points of a plot, none on another or on a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from packloop.bench.drawing import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_FONT_POINTS = 8.5
# Tried from the nearest outwards: distance from the point in pixels, then direction, right first.
_DISTANCES = (9, 18, 30, 44, 60, 78, 98, 120, 150, 190)
_DIRECTIONS = (0, 30, -30, 60, -60, 150, -150, 180, 120, -120, 90, -90)
_FAR = 18


def place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each name where it is free, with a line to its point where that is not beside it.

    points: x and y in the units of the axes, whose limits are final, and the name. Where no place is free, the name
    goes to the first tried.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    bounds = axes.get_window_extent()
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    taken.extend(artist.get_window_extent() for artist in [*axes.texts, *axes.lines])
    pixels_a_point = figure.dpi / 72
    for (x, y, name), place in sorted(zip(points, places, strict=True), key=lambda pair: -pair[1][1]):
        width, height = _size(axes, name)
        candidates = [
            (distance, _box(place, distance, angle, width, height)) for distance in _DISTANCES for angle in _DIRECTIONS
        ]
        distance, box = next((one for one in candidates if _is_free(one[1], taken, bounds)), candidates[0])
        taken.append(box)
        offset = (box.x0 - place[0]) / pixels_a_point, (box.y0 - place[1]) / pixels_a_point
        arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        label = axes.annotate(
            name,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            fontsize=_FONT_POINTS,
            arrowprops=arrow if distance > _FAR else None,
        )
        label.set_in_layout(False)


def _size(axes: Axes, name: str) -> tuple[float, float]:
    probe = axes.text(0, 0, name, fontsize=_FONT_POINTS)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width + 4, extent.height + 2


def _box(place: Sequence[float], distance: float, degrees: float, width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    along, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = place[0] + distance * along, place[1] + distance * up
    left = x if along > 0.01 else x - width if along < -0.01 else x - width / 2
    bottom = y - height / 2 if abs(up) < 0.99 else y if up > 0 else y - height
    return Bbox.from_bounds(left, bottom, width, height)


def _is_free(box: Bbox, taken: list[Bbox], bounds: Bbox) -> bool:
    inside = bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1
    return inside and not any(box.overlaps(other) for other in taken)
