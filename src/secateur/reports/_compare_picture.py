"""The picture of a comparison as SVG: how fast, how good, and where no other way is both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from secateur.reports._compare_records import WayResult, shape_text
from secateur.reports._compare_rows import View, megabytes, milliseconds
from secateur.reports._drawing import Canvas, TextLine, path, spans, text_at, text_size, ticks, time_ticks, tip
from secateur.reports._label_places import Box, Label, Line, label_places
from secateur.reports._tables import figure

_FAR = 3.0  # a point this many spans of the frontier below it stands at the edge, so that the others can be told apart


WIDE = Canvas("wide", 1040, 560, 58, 13, True)
NARROW = Canvas("slim", 358, 430, 44, 12, False)


@dataclass(frozen=True)
class _Scale:
    """Where figures lie on a canvas."""

    canvas: Canvas
    times: tuple[float, float]  # logarithms of the least and the most
    quality: tuple[float, float]  # the worst and the best, so that the best is at the top
    floor: float  # what is worse stands at the edge

    def at(self, times: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = self.canvas.area
        across = (math.log(times) - self.times[0]) / (self.times[1] - self.times[0])
        along = (value - self.quality[0]) / (self.quality[1] - self.quality[0])
        return round(left + across * (right - left), 1), round(bottom - min(max(along, 0.0), 1.0) * (bottom - top), 1)

    def is_off(self, value: float) -> bool:
        """Whether a figure is worse than what the axis shows."""
        return (value - self.floor) * (self.quality[1] - self.quality[0]) < 0


def picture(
    canvas: Canvas,
    ways: Sequence[WayResult],
    view: View,
    points: Mapping[int, tuple[float, float]],
    frontier: Sequence[int],
    reference: int,
    metric: tuple[str, bool],
) -> str:
    """Return the picture of one view, as one SVG element. Its colours and what a pointer shows are in the style sheet.

    Args:
        canvas: to draw on.
        ways: all of them.
        view: a shape of inputs; None for all together.
        points: by the number of the way, how many times as fast as the reference, and the figure.
        frontier: numbers of the ways that no other one beats, from slow to fast.
        reference: number of the way that the others are compared with.
        metric: name of the figure, and whether higher is better.
    """
    scale = _scale(canvas, points, frontier, metric[1])
    places = {number: scale.at(*point) for number, point in points.items()}
    steps = _steps([places[number] for number in frontier], canvas.area)
    name = metric[0].replace("_", " ")
    label = escape(f"{name} over times as fast, {shape_text(view)}", quote=True)
    parts = [
        f'<svg class="{canvas.name}" role="group" aria-label="{label}" viewBox="0 0 {canvas.width} {canvas.height}" '
        'xmlns="http://www.w3.org/2000/svg">',
        _beaten(steps, canvas.area),
        *_axes(scale, name, metric[1], ways[reference].is_dense),
        path("edge", steps),
    ]
    # From those that matter least to those that matter most, which are drawn over them.
    order = sorted(points, key=lambda number: (number in frontier, number == reference, not ways[number].is_dense))
    for number in order:
        parts.append(_mark(ways[number], view, scale, points[number], number in frontier))
    parts += _labels(canvas, ways, order[::-1], places, scale, points, frontier, reference, steps)
    for number in order:
        parts.append(_hover(canvas, ways[number], view, places[number], points[number], name))
    parts.append("</svg>")
    return "\n".join(part for part in parts if part)


def _scale(
    canvas: Canvas, points: Mapping[int, tuple[float, float]], frontier: Sequence[int], higher_is_better: bool
) -> _Scale:
    times = [point[0] for point in points.values()]
    low, high = math.log(min([*times, 1.0])), math.log(max([*times, 1.0]))
    room = 0.06 * (high - low) + 0.05
    sign = 1 if higher_is_better else -1
    values = [sign * value for _, value in points.values()]
    best = max(values)
    span = 0.0
    for value in sorted((sign * points[number][1] for number in frontier), reverse=True):
        if best - value > (1 + _FAR) * max(span, 0.1 * abs(best)):
            break  # however fast it is, it is no model any more
        span = best - value
    span = span or 0.02 * abs(best) or 1.0
    floor = best - (1 + _FAR) * span
    inside = [value for value in values if value >= floor]  # the best is always among them
    worst = min(inside)
    spread = (best - worst) or span
    off = 0.22 * spread if len(inside) < len(values) else 0.0
    return _Scale(
        canvas,
        (low - room, high + room),
        (sign * (worst - 0.12 * spread - off), sign * (best + 0.14 * spread)),
        sign * min(inside),
    )


def _steps(corners: Sequence[tuple[float, float]], area: Box) -> list[tuple[float, float]]:
    """The edge of what the frontier beats: it goes across to each point, and then down to the height of the next."""
    if not corners:
        return []
    found = [(float(area[0]), corners[0][1])]
    for (x, y), after in zip(corners, [*corners[1:], None], strict=True):
        found += [(x, y), (x, area[3] if after is None else after[1])]
    return found


def _beaten(steps: Sequence[tuple[float, float]], area: Box) -> str:
    if not steps:
        return ""
    return path("beaten", [*steps, (area[0], area[3])], close=True)


def _axes(scale: _Scale, name: str, higher_is_better: bool, has_dense: bool) -> list[str]:
    left, top, right, bottom = scale.canvas.area
    parts = []
    slow, fast = (math.exp(end) for end in scale.times)
    for tick in time_ticks(slow, fast, most=9 if scale.canvas.labels_all else 5):
        x, _ = scale.at(tick, scale.quality[0])
        kind = "one" if tick == 1 else "grid"
        parts.append(f'<path class="{kind}" d="M{x:g} {top:g}V{bottom:g}"/>')
        parts.append(text_at(x, bottom + 17, f"{tick:g}\N{MULTIPLICATION SIGN}", "tick", "middle"))
    for value in ticks(*sorted(scale.quality)):
        if scale.is_off(value):
            continue
        _, y = scale.at(1.0, value)
        parts.append(f'<path class="grid" d="M{left:g} {y:g}H{right:g}"/>')
        parts.append(text_at(left - 8, y + 4, f"{value:,g}", "tick", "end"))
    wide = scale.canvas.labels_all
    across = "times as fast as PyTorch"
    if has_dense:
        across += " with the dense model" if wide else ", dense"
    parts.append(text_at(right, bottom + 36, f"{across} \N{RIGHTWARDS ARROW}", "title", "end"))
    better = "" if higher_is_better else ", lower is better"
    parts.append(text_at(4, 16, f"\N{UPWARDS ARROW} {name}{better}", "title", "start"))
    parts.append(text_at(right, 16, "faster and better \N{NORTH EAST ARROW}", "title", "end"))
    return parts


def _kind(way: WayResult, on: bool) -> str:
    return f"{'dense' if way.is_dense else 'ours'}{' on' if on else ''}"


def _mark(way: WayResult, view: View, scale: _Scale, point: tuple[float, float], on: bool) -> str:
    """A point, and how widely its times are spread."""
    x, y = scale.at(*point)
    spread = ""
    timing = next((timing for timing in way.timings if timing.shape == view), None)
    if timing is not None and timing.times[0] > 0:
        ends = [scale.at(times, point[1])[0] for times in (timing.times[0], timing.times[2])]
        low, high = max(ends[0], scale.canvas.area[0]), min(ends[1], scale.canvas.area[2])
        spread = f'<path class="spread{" noisy" if timing.noisy else ""}" d="M{low:g} {y:g}H{high:g}"/>'
    if scale.is_off(point[1]):
        shape = f'<path class="dot" d="M{x - 5:g} {y - 9:g}H{x + 5:g}L{x:g} {y:g}Z"/>'
    else:
        shape = f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="{_radius(on)}"/>'
    return f'<g class="{_kind(way, on)}">{spread}{shape}</g>'


def _radius(on: bool) -> float:
    return 6.5 if on else 4.5


def _labels(
    canvas: Canvas,
    ways: Sequence[WayResult],
    order: Sequence[int],
    places: Mapping[int, tuple[float, float]],
    scale: _Scale,
    points: Mapping[int, tuple[float, float]],
    frontier: Sequence[int],
    reference: int,
    steps: Sequence[tuple[float, float]],
) -> list[str]:
    """The labels of the points, with lines to those that are far away. Those of the frontier are chosen first."""
    shown = [number for number in order if canvas.labels_all or number in frontier or number == reference]
    texts = {number: _lines(canvas, ways[number], number in frontier, scale, points[number][1]) for number in shown}
    labels = [Label(places[number], text_size(texts[number])) for number in shown]
    discs = [(*places[number], _radius(number in frontier) + 1.5) for number in points]
    lines: list[Line] = [(*one, *other) for one, other in pairwise(steps)]
    area = (2.0, 24.0, canvas.width - 2.0, canvas.area[3])
    parts = []
    for number, place in zip(shown, label_places(labels, discs, lines, area), strict=True):
        kind = _kind(ways[number], number in frontier)
        if place.leader is not None:
            x, y, right, down = place.leader
            parts.append(f'<path class="leader" d="M{x:g} {y:g}L{right:g} {down:g}"/>')
        parts.append(f'<text class="label {kind}">{spans(texts[number], place)}</text>')
    return parts


def _lines(canvas: Canvas, way: WayResult, on: bool, scale: _Scale, value: float) -> list[TextLine]:
    small = canvas.text - 2
    found: list[TextLine] = [(way.title, canvas.text if on else small, on)]
    second = [f"{megabytes(way.nbytes)} MB"] if way.nbytes is not None and on else []
    second += [figure(value)] if scale.is_off(value) else []
    return [*found, (", ".join(second), small - 0.5, False)] if second else found


def _hover(
    canvas: Canvas, way: WayResult, view: View, place: tuple[float, float], point: tuple[float, float], name: str
) -> str:
    """What a pointer, a finger or the keyboard shows of a point. It is drawn after all points, and so over them."""
    lines = [way.title, way.model, *way_figures(way, view, point, name)]
    return tip(canvas, lines, place, f"way {_kind(way, False)}")


def way_figures(way: WayResult, view: View, point: tuple[float, float], name: str) -> list[str]:
    """Return the figures of a way, a line for each.

    Args:
        way: to describe.
        view: a shape of inputs; None for all together.
        point: how many times as fast as the reference, and the figure.
        name: of the figure.
    """
    timing = next((timing for timing in way.timings if timing.shape == view), None)
    times = f"{point[0]:.2f} times as fast"
    if timing is not None:
        times += f" ({timing.times[0]:.2f} to {timing.times[2]:.2f})"
    found = [times, f"{name} {figure(point[1])}"]
    if timing is not None:
        found.insert(1, f"{milliseconds(timing)} ms" + (", noisy" if timing.noisy else ""))
    if way.nbytes is not None:
        found.append(f"{megabytes(way.nbytes)} MB on disk")
    if way.memory is not None:
        found.append(f"{megabytes(way.memory)} MB in memory")
    return found
