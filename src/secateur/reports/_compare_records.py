"""One way to run a model, as it was measured, and which of several ways are worth choosing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import geometric_mean
from typing import Any

from secateur.reports._checked import checked
from secateur.reports._evaluating import Figure
from secateur.reports._tables import figure


@dataclass(frozen=True)
class WayTiming:
    """How long one way took for inputs of one shape, in rounds in which all ways took turns.

    Args:
        shape: of the input, ``(batch, tokens)`` or that of its first tensor.
        milliseconds: lower quartile, median and upper quartile.
        times: how many times as fast as the reference, by the ratios within rounds: lower quartile, median and upper
            quartile.
        noisy: whether the machine was busy with something else meanwhile.
    """

    shape: tuple[int, ...]
    milliseconds: tuple[float, float, float]
    times: tuple[float, float, float]
    noisy: bool = False


@dataclass(frozen=True)
class WayResult:
    """One way to run one model.

    Args:
        way: its name, such as ``"onnx-int8"``.
        title: in words, such as ``"ONNX Runtime int8"``.
        model: that is run, by the name of its directory or class; ``"dense"`` for the dense one beside another.
        is_dense: whether that is the dense model, which the other is compared with.
        timings: by shape. A shape that it does not take is not among them.
        nbytes: of the weights on the disk, as they would be deployed; None if they were not written.
        memory: resident bytes that a process of its own gains by loading and running it; None if not measured.
        figures: how good it is, the one that the comparison is about first.
        absence: why it could not be run; empty if it could.
        notes: what else is worth knowing.
    """

    way: str
    title: str
    model: str
    is_dense: bool
    timings: tuple[WayTiming, ...] = ()
    nbytes: int | None = None
    memory: int | None = None
    figures: tuple[Figure, ...] = ()
    absence: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The way and the model."""
        return f"{self.title}, {self.model}"

    @property
    def quality(self) -> float | None:
        """The first figure; None if it was not measured."""
        return self.figures[0].value if self.figures else None

    def times_at(self, shape: Sequence[int] | None, shapes: Iterable[Sequence[int]] = ()) -> float | None:
        """How many times as fast as the reference, for inputs of one shape.

        Args:
            shape: of the inputs; None for the geometric mean over several.
            shapes: of which the mean is taken. It is None where one was not measured.
        """
        known = {timing.shape: timing.times[1] for timing in self.timings}
        wanted = [tuple(one) for one in shapes] if shape is None else [tuple(shape)]
        found = [known[one] for one in wanted if one in known]
        if not found or len(found) < len(wanted) or min(found) <= 0:
            return None
        return found[0] if len(found) == 1 else geometric_mean(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the way as a JSON-ready dict."""
        return {**asdict(self), "figures": [found.to_dict() for found in self.figures]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> WayResult:
        """Return the way that :meth:`to_dict` wrote."""
        timings = tuple(
            checked(
                WayTiming(
                    tuple(timing["shape"]), tuple(timing["milliseconds"]), tuple(timing["times"]), timing["noisy"]
                )
            )
            for timing in table["timings"]
        )
        figures = tuple(Figure.from_dict(found) for found in table["figures"])
        return checked(cls(**{**table, "timings": timings, "figures": figures, "notes": tuple(table["notes"])}))


def shape_text(shape: Sequence[int] | None) -> str:
    """Return a shape as text: ``"8 x 64"``; for None what stands for all of them together."""
    return "all shapes" if shape is None else " x ".join(map(str, shape))


def seen(value: float) -> float:
    """Return a figure with the digits that tables show. What looks the same is the same."""
    return float(figure(value).replace(",", ""))


def frontier(points: Mapping[int, tuple[float, float]], higher_is_better: bool = True) -> tuple[int, ...]:
    """Return which points no other one beats, from slow to fast.

    A point is beaten by one that is faster and at least as good, by the digits that tables show, and by one that is as
    fast and better.

    Args:
        points: by number: how many times as fast as the reference, and the figure.
        higher_is_better: of the figure.

    Example:
        >>> from secateur.reports import frontier
        >>> frontier({0: (1.0, 100.0), 1: (2.0, 99.0), 2: (1.5, 98.0), 3: (4.0, 90.0)})
        (0, 1, 3)
    """
    sign = 1 if higher_is_better else -1
    usable = {
        number: (times, sign * seen(value))
        for number, (times, value) in points.items()
        if math.isfinite(times) and math.isfinite(value)
    }
    kept = [
        number
        for number, (times, value) in usable.items()
        if not any(
            (other > times and good >= value) or (other == times and good > value) for other, good in usable.values()
        )
    ]
    return tuple(sorted(kept, key=lambda number: usable[number]))


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return json.loads(json.dumps(value))
