"""What a pipeline did to a model, stage by stage, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from secateur.reports._html import Fact, tables_page
from secateur.reports._tables import Table, TableColumn, bars, figure, markdown_text, sentence

# In the order of the columns. Others follow, as they are measured.
_HEADINGS = {
    "parameters": "parameters",
    "sparsity": "sparsity",
    "sparsity_total": "sparsity of the whole model",
    "bytes": "bytes",
    "speedup": "times as fast",
    "minutes": "minutes",
}
_PERCENT = ("sparsity", "sparsity_total")
_PICTURES = ("bytes", "speedup")  # beside the figures of quality


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Args:
        gate: as text, such as ``"perplexity <= 1.05 * dense"``.
        figure: that it compares.
        value: of the model of the stage; None if it could not be measured.
        dense: the same figure of the dense model, None if there is none.
        bound: as a number.
        passed: whether the value is within the bound.
    """

    gate: str
    figure: str
    value: float | None
    dense: float | None
    bound: float
    passed: bool

    def __str__(self) -> str:
        said = "was not measured" if self.value is None else f"is {figure(self.value)}"
        dense = "" if self.dense is None else f" (dense model {figure(self.dense)})"
        return f"{self.figure} {said}{dense}, the gate is {self.gate}: {'passed' if self.passed else 'FAILED'}"


@dataclass(frozen=True)
class PipelineStage:
    """What one stage made.

    Args:
        number: from 1.
        run: what the stage did: ``"prune"``, ``"shrink"``, ``"recover"``, ``"evaluate"``, ``"pack"``.
        settings: from the recipe, without gates.
        directory: that has its model.
        summary: what its report says, in lines.
        figures: of its model, by name.
        speeds: how many times as fast as the dense model, by shape.
        gates: what they found, in the order of the recipe.
        reused: the model is that of an earlier run.
        changed: what is no longer as in an earlier run, so that the stage was done again.
        notes: what else is worth knowing.
    """

    number: int
    run: str
    settings: Mapping[str, Any]
    directory: str
    summary: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    speeds: Mapping[str, float] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    reused: bool = False
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"stage {self.number} ({self.run})"

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """The gates that the model did not pass."""
        return tuple(found for found in self.gates if not found.passed)


@dataclass(frozen=True)
class PipelineReport:
    """What :meth:`Pipeline.run` did.

    Args:
        model: directory of the dense model.
        output: directory of the result, which exists only if all gates were passed.
        stages: that were run, in order. The last one may have failed.
        planned: how many stages the recipe has.
        dense: figures of the dense model, by name.
        recipe: as TOML.
        versions: of secateur, torch and Python.
        work: folder with the results of all stages.
        notes: what else is worth knowing.

    Example:
        >>> from secateur import PipelineReport
        >>> report = PipelineReport("bert", "small", (), 2, {}, "schema = 1", {}, "small.work")
        >>> report.passed, PipelineReport.from_json(report.to_json()) == report
        (False, True)
    """

    model: str
    output: str
    stages: tuple[PipelineStage, ...]
    planned: int
    dense: Mapping[str, float]
    recipe: str
    versions: Mapping[str, str]
    work: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all stages were run and all gates passed, so that the output was written."""
        return len(self.stages) == self.planned and not self.failed

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """The gates that ended the run; empty if none did."""
        return tuple(found for stage in self.stages for found in stage.failed)

    def _lines(self) -> list[str]:
        lines = []
        for stage in self.stages:
            done = "found as an earlier run left it" if stage.reused else "done"
            if stage.changed:
                done += f" again, because this differs from the earlier run: {', '.join(stage.changed)}"
            lines.append(f"{stage.title}: {done}{''.join(f'; {line}' for line in stage.summary[:1])}")
            lines += [f"{stage.title}: {found}" for found in stage.gates]
            lines += [f"{stage.title}: {note}" for note in stage.notes]
        if self.failed:
            last = self.stages[-1]
            lines.append(
                f"{last.title} did not pass, so {self.output} was not written; its model is {last.directory}, and "
                f"the results of all stages are in {self.work}"
            )
        elif self.passed:
            lines.append(
                f"all {self.planned} stages are done, and {sum(len(s.gates) for s in self.stages)} gates passed"
            )
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists. What is not finite is text, such as ``"nan"``."""
        table: dict[str, Any] = _plain({**asdict(self), "passed": self.passed})
        return table

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> PipelineReport:
        """Return the report that :meth:`to_dict` gave.

        Raises:
            ValueError: it is not such a report.
        """
        try:
            rest = {key: value for key, value in table.items() if key != "passed"}
            stages = tuple(_stage(**entry) for entry in rest.pop("stages"))
            return cls(**{**rest, "stages": stages, "dense": _floats(rest["dense"]), "notes": tuple(rest["notes"])})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of a pipeline: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> PipelineReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON or not such a report.
        """
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("not a report of a pipeline: no JSON object")
        return cls.from_dict(table)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the report, in order: figures after each stage, speed at each shape, and gates."""
        return self._figures(), self._speeds(), self._gates()

    def _names(self) -> list[str]:
        found = dict.fromkeys(name for figures in (self.dense, *(s.figures for s in self.stages)) for name in figures)
        quality = [name for name in found if name not in _HEADINGS]
        return [*quality, *(name for name in _HEADINGS if name in found)]

    def _figures(self) -> Table:
        names = self._names()
        rows = [("dense model", self.dense), *((f"{s.number}. {s.run}", s.figures) for s in self.stages)]
        columns = [TableColumn("after")]
        for name in names:
            values = [figures.get(name) for _, figures in rows]
            heading = _HEADINGS.get(name, name.replace("_", " "))
            drawn = all(value is None or value >= 0 for value in values)
            columns.append(TableColumn(heading, is_number=True, bars=bars(values) if drawn else ()))
        cells = tuple((name, *(_figure(column, figures.get(column)) for column in names)) for name, figures in rows)
        return Table("The model after each stage", tuple(columns), cells)

    def _speeds(self) -> Table:
        shapes = list(dict.fromkeys(shape for stage in self.stages for shape in stage.speeds))
        columns = (TableColumn("after"), *(TableColumn(shape, is_number=True) for shape in shapes))
        rows = tuple(
            (f"{s.number}. {s.run}", *(figure(s.speeds.get(shape)) for shape in shapes))
            for s in self.stages
            if s.speeds
        )
        return Table("Times as fast as the dense model, by shape", columns, rows)

    def _gates(self) -> Table:
        headings = ("stage", "gate", "value", "dense model", "bound", "")
        columns = tuple(TableColumn(text, is_number=text in ("value", "dense model", "bound")) for text in headings)
        rows = tuple(
            (f"{s.number}. {s.run}", g.gate, figure(g.value), figure(g.dense), figure(g.bound), _word(g))
            for s in self.stages
            for g in s.gates
        )
        strong = tuple((row, 5) for row, cells in enumerate(rows) if cells[5] != "passed")
        return Table("Gates", columns, rows, strong=strong)

    def to_markdown(self) -> str:
        """Return the summary and the tables as Markdown."""
        parts = ["# Pipeline report", *(f"{sentence(markdown_text(line))}." for line in self._lines())]
        for table in self.tables:
            if table.rows:
                parts += [f"## {table.title}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        last = self.stages[-1].figures if self.stages else {}
        passed = sum(found.passed for stage in self.stages for found in stage.gates)
        facts = [
            Fact("Result", "passed" if self.passed else "FAILED", f"{len(self.stages)} of {self.planned} stages"),
            Fact("Gates passed", str(passed), f"of {sum(len(stage.gates) for stage in self.stages)}"),
        ]
        for name in self._names():
            if name in last and name != "minutes":
                aside = f"dense model {_figure(name, self.dense[name])}" if name in self.dense else ""
                facts.append(
                    Fact(sentence(_HEADINGS.get(name, name.replace("_", " "))), _figure(name, last[name]), aside)
                )
        facts.append(Fact("Minutes", figure(sum(s.figures.get("minutes", 0.0) for s in self.stages)), "of all stages"))
        lead = [f"{sentence(line)}." for line in self._lines()]
        return tables_page("Pipeline report", lead, facts, self.tables, self._pictures())

    def _pictures(self) -> tuple[str, ...]:
        """A chart for each figure of quality, for size and for speed: a bar for the dense model and for each stage."""
        names = [name for name in self._names() if name not in _HEADINGS or name in _PICTURES]
        rows = [
            ("dense model", self.dense, False),
            *((f"{s.number}. {s.run}", s.figures, bool(s.failed)) for s in self.stages),
        ]
        charts = [
            _chart(name, [(label, figures[name], failed) for label, figures, failed in rows if name in figures])
            for name in names
            if any(name in figures for _, figures, _ in rows)
        ]
        return tuple(charts)


def _chart(name: str, rows: list[tuple[str, float, bool]]) -> str:
    """Bars as SVG, with a label and the figure beside each."""
    heading, lengths = _HEADINGS.get(name, name.replace("_", " ")), bars([max(value, 0.0) for _, value, _ in rows])
    lines = []
    for number, ((label, value, failed), length) in enumerate(zip(rows, lengths, strict=True)):
        y = 24 * number
        mark = " \N{EM DASH} gate failed" if failed else ""
        lines.append(
            f'<text x="0" y="{y + 15}" fill="currentColor">{escape(label)}</text>'
            f'<rect x="120" y="{y + 3}" width="{max(1.0, 320 * length):.1f}" height="16" fill="currentColor" '
            f'opacity="{"0.25" if failed else "0.55"}"/>'
            f'<text x="{128 + 320 * length:.1f}" y="{y + 15}" fill="currentColor">{_figure(name, value)}{mark}</text>'
        )
    return (
        f'<figure><figcaption>{escape(sentence(heading))} after each stage</figcaption>\n<svg viewBox="0 0 640 '
        f'{24 * len(rows)}" width="640" role="img" font-size="13" aria-label="{escape(heading)} after each stage">'
        f"{''.join(lines)}</svg></figure>"
    )


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in _PERCENT:
        return f"{value:.2%}"
    return f"{value:,.0f}" if name in ("bytes", "parameters") else figure(value)


def _word(found: GateResult) -> str:
    return "passed" if found.passed else "FAILED"


def _plain(value: Any) -> Any:
    """A value as JSON has it: lists for tuples, text for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _floats(table: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) if isinstance(value, str) else value for name, value in table.items()}


def _stage(gates: Any, figures: Any, speeds: Any, summary: Any, changed: Any, notes: Any, **rest: Any) -> PipelineStage:
    return PipelineStage(
        **rest,
        figures=_floats(figures),
        speeds=_floats(speeds),
        gates=tuple(GateResult(**_floats_of(entry)) for entry in gates),
        summary=tuple(summary),
        changed=tuple(changed),
        notes=tuple(notes),
    )


def _floats_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: entry[name] for name in ("value", "dense", "bound") if isinstance(entry.get(name), str)}
    return {**entry, **_floats(numbers)}
