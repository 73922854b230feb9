"""How good a model was found to be, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._html import Fact, tables_page
from secateur.reports._tables import Table, TableColumn, figure, markdown_text, sentence


@dataclass(frozen=True)
class Figure:
    """One quality figure of a model, and the same of the dense model.

    Args:
        metric: by its name, such as ``"perplexity"``.
        value: of the model. NaN where its outputs are not finite, or all cosines are the same.
        dense: of the dense model; None without one. Where a figure compares both, what an equal model would have.
        count: of what it was measured on.
        unit: what was counted: ``"tokens"``, ``"sentences"``, ``"pairs"``, ``"texts"`` or ``"batches"``.
        higher_is_better: None where nobody says, for a function of the user.
        file: name of the file; empty for batches.
        note: what else to know, such as how many sentences of how many were used.
    """

    metric: str
    value: float
    dense: float | None = None
    count: int = 0
    unit: str = ""
    higher_is_better: bool | None = None
    file: str = ""
    note: str = ""

    @property
    def difference(self) -> float | None:
        """``value - dense``; None without a dense model."""
        return None if self.dense is None else self.value - self.dense

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as a JSON-ready dict with its difference. What is not finite is text, such as ``"nan"``."""
        table = {**asdict(self), "difference": self.difference}
        return {name: _plain(value) for name, value in table.items()}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Figure:
        """Return the figure that :meth:`to_dict` wrote."""
        fields = {name: value for name, value in table.items() if name != "difference"}
        dense = fields.get("dense")
        return cls(**{**fields, "value": float(fields["value"]), "dense": None if dense is None else float(dense)})


@dataclass(frozen=True)
class EvaluationReport:
    """What :func:`evaluate` found.

    Args:
        figures: in the order of the files.
        model: its class, or the name of its directory.
        dense: the same of the dense model; empty without one.
        seconds: of the whole run.
        notes: what could not be measured, and why; and what else is worth knowing.
        versions: of secateur, torch and Python.
    """

    figures: tuple[Figure, ...]
    model: str
    dense: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        """The value of a metric: ``report["perplexity"]``. Of several files, the first that gave it."""
        for found in self.figures:
            if found.metric == metric:
                return found.value
        raise KeyError(f"{metric!r}; measured: {', '.join(found.metric for found in self.figures) or 'nothing'}")

    @property
    def tables(self) -> tuple[Table, ...]:
        """One table with a row for each figure."""
        return (figures_table(self.figures),)

    def _lines(self) -> list[str]:
        against = f" beside {self.dense}" if self.dense else ""
        return [f"{self.model}{against}, {self.seconds:.1f} s", *self.notes]

    def __str__(self) -> str:
        rows = [_line(found) for found in self.figures]
        return "\n".join([*self._lines(), *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists. Figures that are not finite are text, such as ``"nan"``."""
        return {
            "figures": [found.to_dict() for found in self.figures],
            "model": self.model,
            "dense": self.dense,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> EvaluationReport:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            fields = dict(table)
            figures = tuple(Figure.from_dict(found) for found in fields.pop("figures"))
            notes = tuple(fields.pop("notes", ()))
            return cls(figures, notes=notes, **fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of an evaluation: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not such a report.
        """
        return cls.from_dict(json.loads(text))

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = ["# Evaluation", *(f"{sentence(markdown_text(line)).rstrip('.')}." for line in self._lines())]
        return "\n\n".join(parts + [table.to_markdown() for table in self.tables if table.rows]) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        facts = [
            Fact(sentence(_title(found.metric)), figure(found.value), _beside(found)) for found in self.figures[:6]
        ]
        lead = [f"{sentence(line).rstrip('.')}." for line in self._lines()]
        return tables_page("Evaluation", lead, facts, self.tables)


def figures_table(figures: Sequence[Figure]) -> Table:
    """Return a table with a row for each figure."""
    columns = (
        TableColumn("metric"),
        TableColumn("file"),
        TableColumn("measured on", is_number=True),
        TableColumn("model", is_number=True),
        TableColumn("dense", is_number=True),
        TableColumn("difference", is_number=True),
        TableColumn("better"),
        TableColumn("notes", is_note=True),
    )
    better = {True: "higher", False: "lower", None: ""}
    rows = tuple(
        (
            _title(found.metric),
            found.file,
            f"{found.count:,} {found.unit}" if found.unit else "",
            figure(found.value),
            figure(found.dense),
            "" if found.difference is None else f"{found.difference:+.4g}",
            better[found.higher_is_better],
            found.note,
        )
        for found in figures
    )
    return Table("Quality", columns, rows)


def _line(found: Figure) -> str:
    place = f" on {found.count:,} {found.unit}" if found.unit else ""
    place += f" of {found.file}" if found.file else ""
    note = f"; {found.note}" if found.note else ""
    beside = f" ({_beside(found)})" if found.dense is not None else ""
    return f"{_title(found.metric)} {figure(found.value)}{beside}{place}{note}"


def _beside(found: Figure) -> str:
    if found.dense is None:
        return f"of {found.file}" if found.file else ""
    return f"dense {figure(found.dense)}, {found.difference:+.4g}"


def _title(metric: str) -> str:
    return metric.replace("_", " ")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
