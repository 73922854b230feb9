"""All ways to run a model on this machine, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.reports._checked import checked
from secateur.reports._compare_page import compare_page
from secateur.reports._compare_records import WayResult, frontier, plain, shape_text
from secateur.reports._compare_rows import absent_table, figures_of_ways_table, milliseconds_table, ways_table
from secateur.reports._tables import Table, figure, markdown_text, sentence


@dataclass(frozen=True)
class ComparisonReport:
    """What :func:`compare` found.

    Args:
        ways: to run the dense model and the given one, those that could not be run among them.
        shapes: of the inputs, in the order of the tables.
        reference: number of the way that all others are compared with: the dense model in PyTorch.
        model: name of the directory or class of the given model.
        dense: the same of the dense one; empty if there is only one model.
        metric: the figure that the comparison is about.
        higher_is_better: of that figure.
        threads: that every way computed with.
        seconds: of the whole run.
        machine: that times were measured on.
        notes: what else is worth knowing.
        versions: of secateur, torch, Python and the engines.

    Example:
        >>> import copy, torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = copy.deepcopy(dense)
        >>> _ = secateur.prune_(model, sparsity=0.5, method="magnitude")
        >>> report = secateur.compare(model, [torch.randn(8, 64)], dense=dense, ways=["torch"], memory=False)
        >>> report.metric, [way.name for way in report.ways]
        ('similarity', ['PyTorch, dense', 'PyTorch, Sequential'])
    """

    ways: tuple[WayResult, ...]
    shapes: tuple[tuple[int, ...], ...]
    reference: int
    model: str
    dense: str
    metric: str
    higher_is_better: bool
    threads: int = 1
    seconds: float = 0.0
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> WayResult:
        """The way of the given model by its name, such as ``report["onnx-int8"]``; of the dense one if it is alone."""
        found = [way for way in self.ways if way.way == name]
        if not found:
            raise KeyError(f"{name!r}; there are {', '.join(dict.fromkeys(way.way for way in self.ways))}")
        return next((way for way in found if not way.is_dense), found[0])

    def frontier(self, shape: Sequence[int] | None = None) -> tuple[WayResult, ...]:
        """Return the ways worth choosing, from slow to fast: no other one is both faster and at least as good.

        Args:
            shape: of the inputs; None for the geometric mean over all shapes.

        Raises:
            KeyError: the shape was not measured.
        """
        return tuple(self.ways[number] for number in self._frontier(shape))

    def _frontier(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        if shape is not None and tuple(shape) not in self.shapes:
            raise KeyError(f"{shape_text(shape)}; measured: {', '.join(map(shape_text, self.shapes))}")
        return frontier(self._points(shape), self.higher_is_better)

    def _points(self, shape: Sequence[int] | None) -> dict[int, tuple[float, float]]:
        points = {}
        for number, way in enumerate(self.ways):
            times, value = way.times_at(shape, self.shapes), way.quality
            if times is not None and value is not None and math.isfinite(value):
                points[number] = times, value
        return points

    @property
    def _views(self) -> tuple[tuple[int, ...] | None, ...]:
        return (None, *self.shapes) if len(self.shapes) > 1 else self.shapes

    @property
    def first_line(self) -> str:
        """The fastest way, and what it costs."""
        return "; ".join(self._headlines()) or "no way could be run"

    def _headlines(self) -> list[str]:
        view = self._views[0] if self.shapes else None
        best = self.frontier(view) if self.shapes else ()
        if not best:
            return []
        name = self.metric.replace("_", " ")
        over = "over all shapes" if view is None else f"at {shape_text(view)}"
        lines = []
        fastest = best[-1]
        lines.append(
            f"fastest {over}: {fastest.name}, {fastest.times_at(view, self.shapes):.2f} times as fast as "
            f"{self.ways[self.reference].name}; {name} {figure(fastest.quality)}"
        )
        if len(best) > 1:
            good, times = best[0], best[0].times_at(view, self.shapes)
            lines.append(f"best {name}: {good.name}, {figure(good.quality)}; {times:.2f} times as fast")
        return lines

    def _lines(self) -> list[str]:
        processor = self.machine.get("processor", "")
        where = f"{self.threads} thread{'s' if self.threads != 1 else ''}" + (f" of {processor}" if processor else "")
        run = sum(not way.absence for way in self.ways)
        lines = [*self._headlines(), f"{run} of {len(self.ways)} ways were run, in turn, with {where}"]
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the report: the ways, their milliseconds, further figures, and what could not be run."""
        marks = {view: self._frontier(view) for view in self._views}
        return (
            ways_table(self.ways, self.shapes, self.reference, self.metric, marks),
            milliseconds_table(self.ways, self.shapes),
            figures_of_ways_table(self.ways),
            absent_table(self.ways),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists, with the frontier of each shape and of all together."""
        table = {
            "ways": [way.to_dict() for way in self.ways],
            "shapes": self.shapes,
            "reference": self.reference,
            "model": self.model,
            "dense": self.dense,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "threads": self.threads,
            "seconds": self.seconds,
            "machine": dict(self.machine),
            "notes": self.notes,
            "versions": dict(self.versions),
            "frontier": {shape_text(view): self._frontier(view) for view in self._views},
        }
        known: dict[str, Any] = plain(table)
        return known

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ComparisonReport:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            rest = {name: value for name, value in table.items() if name != "frontier"}
            made = checked(
                cls(
                    **{
                        **rest,
                        "ways": tuple(WayResult.from_dict(way) for way in rest["ways"]),
                        "shapes": tuple(tuple(shape) for shape in rest["shapes"]),
                        "notes": tuple(rest["notes"]),
                    }
                )
            )
            if not 0 <= made.reference < len(made.ways):
                raise ValueError(f"there is no way number {made.reference}")
            return made
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of a comparison: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> ComparisonReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not such a report.
        """
        return cls.from_dict(json.loads(text))

    def to_markdown(self) -> str:
        """Return the summary and the tables as Markdown."""
        parts = ["# Comparison", *(f"{sentence(markdown_text(line)).rstrip('.')}." for line in self._lines())]
        for table in self.tables:
            if table.rows:
                parts += [f"## {table.title}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page with the picture; it loads nothing and runs nothing."""
        views = {view: (self._points(view), self._frontier(view)) for view in self._views}
        lines = [line for line in self._lines() if line not in self._headlines()]
        return compare_page(
            lines,
            self.ways,
            self.reference,
            (self.model, self.dense),
            (self.metric, self.higher_is_better),
            views,
            self.tables,
        )
