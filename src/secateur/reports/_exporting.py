"""What exporting a model to another engine did, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._checked import checked
from secateur.reports._html import Fact, tables_page
from secateur.reports._tables import Table, TableColumn, bars, figure, markdown_text, sentence

SCHEMA = 1
EXPORT_TARGETS: Mapping[str, str] = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}  # formats, and who runs them


@dataclass(frozen=True)
class ExportedInput:
    """An input of an exported model.

    Args:
        name: of the input.
        dtype: of its numbers, such as ``"int64"``.
        shape: one entry for each dimension: its size, or the name of a size that may be any.
        default: what it is if it is left out: ``"ones"``, ``"zeros"``, ``"positions"`` (0, 1, 2, ... in each row, after
            those of a cache), ``"empty"`` (a cache without tokens). Empty if it must be given.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    default: str = ""


@dataclass(frozen=True)
class ExportCheck:
    """How the exported model compares with the PyTorch model in float32 on one input.

    Args:
        shape: of the input, such as ``"3x7"``.
        error: the largest difference over all outputs, as a part of the largest number in the output. Padding is left
            out.
        cosine: of both outputs, taken as one vector each; the lowest of all outputs.
    """

    shape: str
    error: float
    cosine: float


@dataclass(frozen=True)
class ExportTiming:
    """Milliseconds of one call, measured in turn with the same threads.

    Args:
        shape: of the input, such as ``"8x64"``.
        engine: milliseconds in the engine, the median.
        pytorch: the same of the PyTorch model, in eager mode and float32.
        ratio: how many times as fast the engine is: the median of the ratios within each round.
        low: their lower quartile.
        high: their upper quartile.
    """

    shape: str
    engine: float
    pytorch: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote, how it compares with the PyTorch model, and how fast it is.

    Args:
        model: its class.
        to: the format, ``"onnx"`` or ``"openvino"``.
        file: of the model, relative to the directory.
        precision: in which the engine computes what is not in 8 bits, ``"float32"`` or ``"bfloat16"``.
        int8: whether matrix products are computed in 8 bits.
        inputs: of the exported model, in order.
        outputs: their names, in order.
        bytes_before: of the weights that were exported.
        nbytes: of the files of the exported model.
        checks: of what was written, by input shape.
        float32_error: the largest error of the graph in float32, before anything was rounded.
        timings: by input shape; empty where nothing was measured.
        fused: what the graph was rewritten to, and how often.
        left: matrix products that stayed in float32, and why.
        notes: what else is worth knowing.
        machine: what the times hold for.
        versions: of secateur, torch, Python and the engine.
        seconds: of the whole run.
    """

    model: str
    to: str
    file: str
    precision: str
    int8: bool
    inputs: tuple[ExportedInput, ...]
    outputs: tuple[str, ...]
    bytes_before: int
    nbytes: int
    checks: tuple[ExportCheck, ...]
    float32_error: float
    timings: tuple[ExportTiming, ...] = ()
    fused: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """The largest error of all checks."""
        return max((check.error for check in self.checks), default=0.0)

    @property
    def numbers(self) -> str:
        """In which numbers it computes, in words: ``"int8"``, ``"float32"``, ``"int8 and bfloat16"``."""
        if not self.int8:
            return self.precision
        return "int8" if self.precision == "float32" else f"int8 and {self.precision}"

    @property
    def tables(self) -> tuple[Table, ...]:
        """Speed, checks, and what stayed in float32."""
        return (_timings_table(self), _checks_table(self), _left_table(self))

    def _lines(self) -> list[str]:
        engine = EXPORT_TARGETS.get(self.to, self.to)
        size = f"{self.nbytes:,} bytes, from {self.bytes_before:,} bytes of weights"
        lines = [f"{self.model} for {engine} in {self.numbers}: {self.file}, {size}; {self.seconds:.1f} s"]
        checked_at = f"on made-up inputs of {len(self.checks)} shapes"
        error = f"largest error {self.error:.1e} of the outputs' scale"
        if self.int8 or self.precision != "float32":
            lowest = min((check.cosine for check in self.checks), default=1.0)
            before = f"({self.float32_error:.1e} before rounding)"
            lines.append(f"beside PyTorch in float32 {checked_at}: {error} {before}, lowest cosine {lowest:.6f}")
        else:
            lines.append(f"equal to PyTorch in float32 {checked_at}: {error}")
        if self.fused:
            found = ", ".join(f"{count} {name}" for name, count in self.fused.items())
            lines.append(f"rewritten in the graph: {found}")
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ExportReport:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            fields = dict(table)
            if (schema := fields.pop("schema")) != SCHEMA:
                raise ValueError(f"its schema is {schema!r:.20}, and this version reads {SCHEMA}")
            inputs = tuple(
                checked(ExportedInput(**{**entry, "shape": tuple(entry["shape"])})) for entry in fields.pop("inputs")
            )
            checks = tuple(checked(ExportCheck(**entry)) for entry in fields.pop("checks"))
            timings = tuple(checked(ExportTiming(**entry)) for entry in fields.pop("timings", ()))
            outputs, notes = (tuple(fields.pop(name, ())) for name in ("outputs", "notes"))
            return checked(cls(inputs=inputs, outputs=outputs, checks=checks, timings=timings, notes=notes, **fields))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of an export: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> ExportReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not such a report.
        """
        return cls.from_dict(json.loads(text))

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = ["# Export", *(f"{sentence(markdown_text(line)).rstrip('.')}." for line in self._lines())]
        return "\n\n".join(parts + [table.to_markdown() for table in self.tables if table.rows]) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        facts = [
            Fact("Engine", EXPORT_TARGETS.get(self.to, self.to), self.numbers),
            Fact("Bytes", f"{self.nbytes:,}", f"from {self.bytes_before:,} of weights"),
            Fact("Largest error", f"{self.error:.1e}", "of the outputs' scale, beside PyTorch in float32"),
        ]
        facts += [Fact(f"Speed at {t.shape}", f"{t.ratio:.2f} x", "PyTorch in eager mode") for t in self.timings[:4]]
        lead = [f"{sentence(line).rstrip('.')}." for line in self._lines()]
        return tables_page("Export", lead, facts, [table for table in self.tables if table.rows])


def _timings_table(report: ExportReport) -> Table:
    longest = bars([timing.ratio for timing in report.timings])
    columns = (
        TableColumn("input"),
        TableColumn(f"{EXPORT_TARGETS.get(report.to, report.to)}, ms", is_number=True),
        TableColumn("PyTorch, ms", is_number=True),
        TableColumn("times as fast", is_number=True, bars=longest),
        TableColumn("quartiles", is_number=True),
    )
    rows = tuple(
        (t.shape, figure(t.engine), figure(t.pytorch), f"{t.ratio:.2f}", f"{t.low:.2f} to {t.high:.2f}")
        for t in report.timings
    )
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    return Table("Speed", columns, rows, (f"Measured in turn on: {machine}.",) if rows and machine else ())


def _checks_table(report: ExportReport) -> Table:
    columns = (
        TableColumn("input"),
        TableColumn("largest error", is_number=True),
        TableColumn("cosine", is_number=True),
    )
    rows = tuple((check.shape, f"{check.error:.1e}", f"{check.cosine:.6f}") for check in report.checks)
    return Table("Outputs beside PyTorch in float32", columns, rows)


def _left_table(report: ExportReport) -> Table:
    columns = (TableColumn("product"), TableColumn("reason"))
    return Table("Left in float32", columns, tuple(report.left.items()))
