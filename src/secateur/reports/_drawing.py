"""What pictures of points on a page are drawn with: text, lines, round numbers, and what a pointer shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from secateur.reports._label_places import Box, Place

_LETTER, _BOLD = 0.56, 0.6  # width of a letter in parts of its height, somewhat more than that of usual fonts
_TICKS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)

TextLine = tuple[str, float, bool]  # text, height, whether it is bold


@dataclass(frozen=True)
class Canvas:
    """How large a picture is, in its own units, which are pixels where it is shown in full.

    Args:
        name: of its CSS class.
        width: of all.
        height: of all.
        left: width of the margin for the figures of the vertical axis.
        text: height of the labels of the frontier.
        labels_all: whether ways that are not on the frontier are labelled, too.
    """

    name: str
    width: int
    height: int
    left: int
    text: float
    labels_all: bool

    @property
    def area(self) -> Box:
        """Where points go."""
        return self.left, 34, self.width - 14, self.height - 46


def path(name: str, corners: Sequence[tuple[float, float]], close: bool = False) -> str:
    """Return lines between corners as SVG; empty text if there are none."""
    if not corners:
        return ""
    drawn = "L".join(f"{x:g} {y:g}" for x, y in corners)
    return f'<path class="{name}" d="M{drawn}{"Z" if close else ""}"/>'


def text_size(lines: Sequence[TextLine]) -> tuple[float, float]:
    """Return about how wide and high lines of text are."""
    width = max(len(text) * height * (_BOLD if bold else _LETTER) for text, height, bold in lines)
    return round(width, 1), round(sum(height * 1.18 for _, height, _ in lines), 1)


def spans(lines: Sequence[TextLine], place: Place) -> str:
    """Return the lines of a label at its place, aligned to the side at which its point is."""
    left, top, right, _ = place.box
    turned = abs(place.angle)
    anchor, x = ("start", left) if turned < 80 else ("end", right) if turned > 100 else ("middle", (left + right) / 2)
    found, y = [], top
    for index, (text, height, _) in enumerate(lines):
        y += height * 1.18
        kind = ' class="size"' if index else ""
        found.append(
            f'<tspan{kind} x="{x:g}" y="{y - 0.3 * height:.1f}" text-anchor="{anchor}" font-size="{height:g}">'
            f"{escape(text)}</tspan>"
        )
    return "".join(found)


def time_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers on a logarithmic axis, 1 among them."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for chosen in (_TICKS, (1.0, 2.0, 3.0, 5.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [float(f"{tick * 10.0**decade:.3g}") for decade in decades for tick in chosen]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            break
    return found


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [float(f"{number * step:.12g}") for number in range(first, math.floor(high / step) + 1)]


def text_at(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    """Return text as SVG, with the CSS class and the side at which it is aligned."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def tip(canvas: Canvas, lines: Sequence[str], place: tuple[float, float], kind: str, reach: float = 13) -> str:
    """Return what a pointer, a finger or the keyboard shows of a point, for what is drawn over all points.

    Args:
        canvas: that it must not leave.
        lines: of text, the first one as a heading.
        place: of the point.
        kind: CSS classes of the element.
        reach: radius of the disc around the point that shows it.
    """
    x, y = place
    width = max(190.0, max(len(line) for line in lines) * 12 * _LETTER + 24)
    width, height = min(width, canvas.width - 8), 17 * len(lines) + 16
    left = x + 14 if x + 14 + width < canvas.width - 4 else x - 14 - width
    left = min(max(left, 4), canvas.width - 4 - width)
    top = min(max(y - height - 12 if y > canvas.height / 2 else y + 12, 4), canvas.height - 4 - height)
    texts = "".join(
        text_at(left + 12, top + 22 + 17 * index, line, "" if index else "head", "start")
        for index, line in enumerate(lines)
    )
    label = escape("; ".join(lines), quote=True)
    return (
        f'<g class="{kind}" tabindex="0" role="img" aria-label="{label}">'
        f'<circle class="hit" cx="{x:g}" cy="{y:g}" r="{reach:g}"/>'
        f'<g class="tip"><rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height}" rx="6"/>{texts}'
        "</g></g>"
    )
