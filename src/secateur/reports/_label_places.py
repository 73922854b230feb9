"""Where the labels of a picture go, so that they cover neither points nor lines nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, top, right, bottom
Line = tuple[float, float, float, float]  # from x, y to x, y

_DISTANCES = (7.0, 13.0, 22.0, 34.0, 50.0, 70.0, 94.0, 122.0)
# Right, left, above, below, and between: what readers expect comes first.
_ANGLES = (0, 180, -90, 90, -45, 45, -135, 135, -22, 22, -158, 158, -67, 67, -112, 112)
_PASSES = 6
_ON_LABEL, _ON_POINT, _ON_LINE, _LEADER_ON_LABEL, _LEADER_ON_POINT = 1000.0, 300.0, 45.0, 250.0, 90.0
_NEAR = 14.0  # a label this far away needs no line to its point


@dataclass(frozen=True)
class Label:
    """Text to be put near a point.

    Args:
        point: where it belongs, ``(x, y)``.
        size: width and height of the text.
    """

    point: tuple[float, float]
    size: tuple[float, float]


@dataclass(frozen=True)
class Place:
    """Where a label goes.

    Args:
        box: that it takes.
        leader: line from its point to it; None where it is near enough.
        angle: in which direction of its point it lies, in degrees, 0 to the right and 90 below.
    """

    box: Box
    leader: Line | None
    angle: int


def label_places(
    labels: Sequence[Label], points: Sequence[tuple[float, float, float]], lines: Sequence[Line], area: Box
) -> list[Place]:
    """Return a place for each label. The first labels have the first choice.

    Every label is put where it covers least, one after the other, and then again given all others, until none moves.

    Args:
        labels: to place.
        points: x, y and radius of all points, those without a label among them.
        lines: horizontal or vertical ones, which labels should not cover.
        area: that labels should not leave.

    Example:
        >>> from secateur.reports._label_places import Label, label_places
        >>> (place,) = label_places([Label((50, 50), (30, 10))], [(50, 50, 4)], [], (0, 0, 200, 100))
        >>> place.box, place.leader
        ((57.0, 45.0, 87.0, 55.0), None)
    """
    choices = [_choices(label, points, lines, area) for label in labels]
    taken: list[Place | None] = [None] * len(labels)
    for _ in range(_PASSES):
        moved = False
        for index, options in enumerate(choices):
            others = [place for other, place in enumerate(taken) if place is not None and other != index]
            best = min(options, key=lambda option: option[0] + _against(option[1], others))[1]
            moved |= best != taken[index]
            taken[index] = best
        if not moved:
            break
    return [place for place in taken if place is not None]


def _choices(
    label: Label, points: Sequence[tuple[float, float, float]], lines: Sequence[Line], area: Box
) -> list[tuple[float, Place]]:
    """All places for a label, each with what it costs before other labels are considered."""
    (x, y), (width, height) = label.point, label.size
    found = []
    for reach in _DISTANCES:
        for rank, angle in enumerate(_ANGLES):
            right, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = round(x + right * (reach + width / 2) - width / 2, 1)
            top = round(y + down * (reach + height / 2) - height / 2, 1)
            box = (left, top, left + width, top + height)
            leader = None
            if reach > _NEAR:
                leader = (x, y, min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            cost = reach + 0.6 * rank + 20.0 * _outside(box, area)
            cost += sum(_ON_LINE for line in lines if _touches(box, _around(line)))
            for across, along, radius in points:
                disc = (across - radius, along - radius, across + radius, along + radius)
                cost += _ON_POINT * _touches(box, disc)
                if leader is not None and (across, along) != (x, y):
                    cost += _LEADER_ON_POINT * _crosses(leader, disc)
            found.append((cost, Place(box, leader, angle)))
    return found


def _against(place: Place, others: Sequence[Place]) -> float:
    """What a place costs beside the places of other labels."""
    cost = 0.0
    for other in others:
        if _touches(place.box, other.box):
            cost += _ON_LABEL
        if place.leader is not None and _crosses(place.leader, other.box):
            cost += _LEADER_ON_LABEL
        if other.leader is not None and _crosses(other.leader, place.box):
            cost += _LEADER_ON_LABEL
    return cost


def _outside(box: Box, area: Box) -> float:
    """How far a box reaches beyond an area."""
    beyond = (area[0] - box[0], area[1] - box[1], box[2] - area[2], box[3] - area[3])
    return sum(max(0.0, far) for far in beyond)


def _around(line: Line) -> Box:
    return min(line[0], line[2]), min(line[1], line[3]), max(line[0], line[2]), max(line[1], line[3])


def _touches(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _crosses(line: Line, box: Box) -> bool:
    """Whether a line goes through a box: some part of it is left when it is cut at the four sides."""
    x, y, right, down = line[0], line[1], line[2] - line[0], line[3] - line[1]
    begin, end = 0.0, 1.0
    for step, from_start, from_end in ((right, box[0] - x, box[2] - x), (down, box[1] - y, box[3] - y)):
        if step == 0:
            if from_start > 0 or from_end < 0:
                return False
            continue
        first, second = sorted((from_start / step, from_end / step))
        begin, end = max(begin, first), min(end, second)
    return begin < end
