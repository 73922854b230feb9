"""What could be made of a model for a target, what was made, and how it turned out, as data."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._checked import checked
from secateur.reports._compare_records import plain, shape_text
from secateur.reports._plan_page import PageFacts, plan_page
from secateur.reports._plan_records import PlannedPart, PlanPoint
from secateur.reports._plan_rows import (
    differences_table,
    models_table,
    parts_table,
    percent,
    phases_table,
    recipe_table,
    times_text,
)
from secateur.reports._tables import Table, figure, markdown_text, sentence


@dataclass(frozen=True)
class PlanReport:
    """What :func:`secateur.plan` or :func:`secateur.optimize_` found.

    Args:
        model: name of the directory or class.
        target: as it was given, such as ``"4x"``; empty if only the loss was limited.
        max_loss: as it was given, such as ``"1%"``; empty if the loss was left free.
        metric: the figure that says how good a model is, such as ``"rank"``.
        higher_is_better: of that figure.
        shapes: of the inputs at which time counts.
        dense: the dense model in PyTorch, with its figure.
        alternatives: the dense model in other engines, and in 8 bits, as measured.
        frontier: the least predicted loss for each speed, from slow to fast.
        candidates: models that were made and measured on the way.
        predicted: the chosen one, as the last solution predicted it; None if the target cannot be reached.
        measured: the same as measured at the end; None if nothing was made.
        parts: what happens to each part of the chosen one.
        rounds: for each round in which measured times corrected the costs: predicted and measured milliseconds by
            shape.
        stages: of the recipe, with their settings.
        phases: seconds by what they were spent on.
        reached: whether the target was reached, as measured if something was made, else as predicted.
        threads: that computed.
        machine: that times were measured on.
        notes: what else is worth knowing, such as that another way is as good.
        versions: of secateur, torch, Python and the engines.
        measure: what the loss of points and parts is measured by, such as ``"KL divergence"``.
        needed_speedup: the target as times as fast as the dense model in PyTorch, where the page draws a line; None
            to read it from the target.

    Example:
        >>> from secateur import PlanReport
        >>> from secateur.reports import PlanPoint
        >>> dense = PlanPoint("dense", "torch", (12.0,), (1.0,), 90_000_000, 22_000_000, 0.0, 1.0)
        >>> made = PlanPoint("3 of 6 layers", "onnx-int8", (2.9,), (4.14,), 12_000_000, 11_000_000, 0.03, 0.991)
        >>> report = PlanReport("encoder", "4x", "1%", "rank", True, ((1, 16),), dense, measured=made, reached=True)
        >>> report.first_line
        'target 4x reached: 3 of 6 layers in onnx-int8, 4.14 times as fast as the dense model in PyTorch; rank 0.9910'
        >>> PlanReport.from_json(report.to_json()) == report
        True
    """

    model: str
    target: str
    max_loss: str
    metric: str
    higher_is_better: bool
    shapes: tuple[tuple[int, ...], ...]
    dense: PlanPoint
    alternatives: tuple[PlanPoint, ...] = ()
    frontier: tuple[PlanPoint, ...] = ()
    candidates: tuple[PlanPoint, ...] = ()
    predicted: PlanPoint | None = None
    measured: PlanPoint | None = None
    parts: tuple[PlannedPart, ...] = ()
    rounds: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    reached: bool = False
    threads: int = 1
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    measure: str = "loss"
    needed_speedup: float | None = None

    @property
    def chosen(self) -> PlanPoint | None:
        """The model that was made, as measured; else the one that would be, as predicted; None if there is neither."""
        return self.measured or self.predicted

    @property
    def needed_times(self) -> float | None:
        """How many times as fast as the dense model in PyTorch the target asks for; None if it is about another thing.

        A target in milliseconds is one speedup only where time counts at one shape.
        """
        if self.needed_speedup is not None:
            return self.needed_speedup
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(x|ms)", self.target.strip())
        value = float(found[1]) if found else 0.0
        if found is None or value <= 0:
            return None
        if found[2] == "x":
            return value
        return self.dense.milliseconds[0] / value if len(self.dense.milliseconds) == 1 else None

    @property
    def allowed_figure(self) -> float | None:
        """The worst figure that the limit of the loss allows; None without a limit or a figure of the dense model."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", self.max_loss.strip())
        if found is None or self.dense.figure is None:
            return None
        loss = float(found[1]) * (abs(self.dense.figure) / 100 if found[2] else 1.0)
        return self.dense.figure - loss if self.higher_is_better else self.dense.figure + loss

    @property
    def first_line(self) -> str:
        """What was asked for, and what came of it."""
        chosen = self.chosen
        asked = f"target {self.target}" if self.target else f"a loss of at most {self.max_loss}"
        if chosen is None:
            fastest = max(self.frontier, key=lambda point: point.speedup, default=None)
            best = "" if fastest is None else f"; the fastest that is predicted is {self._said(fastest)}"
            return f"{asked} cannot be reached here{best}"
        if self.measured is None:
            return f"{asked} {'can be reached' if self.reached else 'is missed'}, as predicted: {self._said(chosen)}"
        return f"{asked} {'reached' if self.reached else 'MISSED'}: {self._said(chosen)}"

    def _said(self, point: PlanPoint) -> str:
        name = self.metric.replace("_", " ")
        value = f"; {name} {figure(point.figure)}" if point.figure is not None else ""
        return f"{point.title} in {point.way}, {times_text(point.speedup)} as the dense model in PyTorch{value}"

    def _lines(self) -> list[str]:
        return [self.first_line, *self._comparisons(), *self.notes]

    def _comparisons(self) -> Iterator[str]:
        """Predicted beside measured, the figures beside those of the dense model, what needs no change of weights."""
        name, at = self.metric.replace("_", " "), " and ".join(map(shape_text, self.shapes))
        if self.predicted is not None and self.measured is not None:
            pairs = zip(self.predicted.milliseconds, self.measured.milliseconds, strict=True)
            off = ", ".join(percent(known, guess) for guess, known in pairs)
            guessed, found = _list(self.predicted.milliseconds), _list(self.measured.milliseconds)
            yield f"predicted {guessed} ms at {at}, measured {found} ms ({off})"
        elif self.predicted is not None:
            yield f"predicted {_list(self.predicted.milliseconds)} ms at {at}; nothing was made yet"
        if self.predicted is not None and self.predicted.loss is not None:
            yield f"predicted {self.measure} before recovery: {figure(self.predicted.loss)}"
        allowed, made = self.allowed_figure, self.measured
        if made is not None and made.figure is not None and self.dense.figure is not None:
            limit = ""
            if allowed is not None:
                good = made.figure >= allowed if self.higher_is_better else made.figure <= allowed
                limit = f", {'within' if good else 'BEYOND'} the limit of {figure(allowed)} ({self.max_loss})"
            yield f"{name} {figure(made.figure)}, dense model {figure(self.dense.figure)}{limit}"
        fastest = max(self.alternatives, key=lambda point: point.speedup, default=None)
        if fastest is not None:
            yield f"the fastest without a change of weights: {self._said(fastest)}"
        processor = self.machine.get("processor", "")
        where = f"{self.threads} thread{'s' if self.threads != 1 else ''}" + (f" of {processor}" if processor else "")
        seconds = sum(self.phases.values())
        took = f", in {seconds / 60:.1f} minutes" if seconds else ""
        yield f"measured with {where} at {at}{took}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def points(self) -> tuple[tuple[str, PlanPoint], ...]:
        """Return all points with what they are: those of the frontier first, and the chosen one at the end."""
        found = [("frontier", point) for point in self.frontier]
        found += [("dense", self.dense)]
        found += [("alternative", point) for point in self.alternatives]
        found += [("candidate", point) for point in self.candidates]
        found += [("predicted", self.predicted)] if self.predicted is not None else []
        found += [("measured", self.measured)] if self.measured is not None else []
        return tuple(found)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the report: models, parts, predicted against measured times, stages, and what took how long."""
        known = [(kind, point) for kind, point in self.points() if kind != "frontier"]
        return (
            models_table(known, self.frontier, self.shapes, self.metric, self.measure),
            parts_table(self.parts, self.measure),
            differences_table(self.rounds, self.shapes),
            recipe_table(self.stages),
            phases_table(self.phases),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        known: dict[str, Any] = plain(asdict(self))
        return known

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> PlanReport:
        """Return the report that :meth:`to_dict` gave.

        Raises:
            ValueError: it is not one.
        """
        try:
            given: dict[str, Any] = dict(table)
            for name in ("alternatives", "frontier", "candidates"):
                given[name] = tuple(PlanPoint.from_dict(point) for point in given[name])
            for name in ("dense", "predicted", "measured"):
                given[name] = None if given[name] is None else PlanPoint.from_dict(given[name])
            given["shapes"] = tuple(tuple(shape) for shape in given["shapes"])
            given["parts"] = tuple(PlannedPart.from_dict(part) for part in given["parts"])
            given["rounds"] = tuple(tuple(tuple(times) for times in one) for one in given["rounds"])
            given["stages"], given["notes"] = tuple(given["stages"]), tuple(given["notes"])
            made = checked(cls(**given))
            made._check()
            return made
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of a plan: {error}") from None

    def _check(self) -> None:
        """Raise ValueError where something has not one time for each shape, which no table could show."""
        for kind, point in self.points():
            for name, times in (("milliseconds", point.milliseconds), ("times", point.times)):
                self._check_times(f"{name} of {kind} {point.title!r:.40}", times)
        for number, one in enumerate(self.rounds, 1):
            for times in one:
                self._check_times(f"times of round {number}", times)

    def _check_times(self, name: str, times: Sequence[float]) -> None:
        if len(times) != len(self.shapes) or not times:
            raise ValueError(f"{name} must be one for each of {len(self.shapes)} shapes, got {len(times)}")
        if not all(math.isfinite(value) and value > 0 for value in times):
            raise ValueError(f"{name} must be above 0, got {list(times)}")

    @classmethod
    def from_json(cls, text: str) -> PlanReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not such a report.
        """
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("not a report of a plan: no JSON object")
        return cls.from_dict(table)

    def to_csv(self) -> str:
        """Return all points as comma-separated values, a line for each: those of the frontier first.

        Times are in milliseconds, a column for each shape. What is not known is empty.
        """
        columns = ["kind", "title", "way", "speedup"]
        columns += [f"milliseconds at {shape_text(shape)}" for shape in self.shapes]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*columns, "bytes", "parameters", "loss", "figure"])
        for kind, point in self.points():
            cells = [kind, point.title, point.way, point.speedup, *point.milliseconds, point.nbytes, point.parameters]
            writer.writerow([*cells, point.loss, point.figure])
        return out.getvalue()

    def to_html(self) -> str:
        """Return one self-contained HTML page with the picture; it loads nothing and runs nothing."""
        facts = PageFacts(
            model=self.model,
            lines=self._lines(),
            dense=self.dense,
            alternatives=self.alternatives,
            candidates=self.candidates,
            frontier=self.frontier,
            chosen=self.chosen,
            is_measured=self.measured is not None,
            parts=self.parts,
            metric=self.metric,
            measure=self.measure,
            needed=self.needed_times,
            allowed=self.allowed_figure,
            is_missed=self.measured is not None and not self.reached,
        )
        return plan_page(facts, self.tables)

    def to_markdown(self) -> str:
        """Return the summary and the tables as Markdown."""
        parts = ["# Plan", *(f"{sentence(markdown_text(line)).rstrip('.')}." for line in self._lines())]
        for table in self.tables:
            if table.rows:
                parts += [f"## {table.title}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"


def _list(times: Sequence[float]) -> str:
    return " and ".join(figure(value) for value in times)
