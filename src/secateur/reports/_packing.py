"""What packing a model did, as data. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from secateur.reports._coverage import packing_line
from secateur.reports._html import Fact, tables_page
from secateur.reports._records import Choice, ModelTime, ModelWeights, PackedLayer, SkippedLayer
from secateur.reports._rows import model_times_table, packed_table, skipped_table
from secateur.reports._tables import Table, figure, markdown_text, sentence

_BUSY = 1.5  # upper over lower quartile; a quiet machine stays below 1.2


@dataclass(frozen=True)
class PackReport:
    """What :func:`pack_` did to a model.

    Args:
        layers: those that have zeros, packed or not; with a precision or a tolerance, also those without.
        skipped: modules with parameters that were left alone.
        machine: what the measurements hold for: processor, instruction set, threads, versions.
        memory: how many times its dense bytes a layer's run-time layouts might take.
        seconds: that packing took.
        notes: what else is worth knowing, such as where the patterns come from.
        whole: the weights of the whole model; None in reports of 0.1.0.
        output_error: ``‖packed - dense‖ / ‖dense‖`` of the outputs of the whole model on the given inputs; None where
            there were none, or where nothing was rounded.
        times: of the whole model before and after, for each input that it was timed with.
    """

    layers: tuple[PackedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    machine: Mapping[str, str]
    memory: float
    seconds: float
    notes: tuple[str, ...] = ()
    whole: ModelWeights | None = None
    output_error: float | None = None
    times: tuple[ModelTime, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Of all layers in the report, dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Of the same layers now; what stayed dense counts as dense."""
        return sum(layer.stored_bytes if layer.packed else layer.dense_bytes for layer in self.layers)

    @property
    def resident_bytes(self) -> int:
        """Of the same layers while they run: stored, and what kernels keep besides."""
        return self.stored_bytes + sum(layer.runtime_bytes for layer in self.layers if layer.packed)

    @property
    def spread(self) -> float:
        """Upper over lower quartile of the ratios, in the median; well above 1 where the machine was busy."""
        found = [choice.high / choice.low for layer in self.layers for choice in layer.choices if choice.low > 0]
        return median(found) if found else 1.0

    @property
    def warning(self) -> str:
        """What to know about the measurements; empty where they can be relied on."""
        if self.spread < _BUSY:
            return ""
        return (
            f"the machine was busy: the quartiles of ratios are {self.spread:.1f} times apart, so that choices may be "
            "poor; pack again on a quiet one"
        )

    @property
    def first_line(self) -> str:
        """The share of the whole model's bytes that is packed now, and that has zeros; empty in reports of 0.1.0."""
        packed = sum(layer.dense_bytes for layer in self.layers if layer.packed)
        return packing_line(self.whole, packed, self.dense_bytes)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        packed = sum(layer.packed for layer in self.layers)
        run = (
            f"packed {packed} of {len(self.layers)} layers{self._which}, skipped {len(self.skipped)} modules; "
            f"{self.dense_bytes:,} bytes dense, {self.stored_bytes:,} stored, {self.resident_bytes:,} while running; "
            f"{self.seconds:.1f} s"
        )
        return [*filter(None, [self.first_line, self._speed()]), run, *filter(None, [self._error])]

    @property
    def _error(self) -> str:
        if self.output_error is None:
            return ""
        return f"the relative error of the model's outputs is {self.output_error:.2g}"

    @property
    def _which(self) -> str:
        return "" if any(layer.format == "dense" for layer in self.layers) else " with zeros"

    def _speed(self) -> str:
        """How fast the whole model is, and how many layers were taken back for it; empty where it was not timed."""
        if not self.times:
            return ""
        taken = sum(layer.taken_back for layer in self.layers)
        back = f"; {taken} layers were taken back" if taken else ""
        if not any(layer.packed for layer in self.layers):
            return f"the whole model would not be faster packed, and stays as it is{back}"
        times = (
            f"{time.ratio:.2f} times as fast at {time.shape} ({figure(time.after)} instead of {figure(time.before)} ms)"
            for time in self.times
        )
        return f"the whole model is {', '.join(times)}{back}"

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PackReport:
        """Return the report that :meth:`to_json` wrote, in this version or in 0.1.0.

        Raises:
            ValueError: the text is not JSON or not such a report.
        """
        try:
            table = json.loads(text)
            layers = []
            for layer in table.pop("layers"):
                choices = tuple(_choice(choice) for choice in layer.pop("choices"))
                shape, tied_to = tuple(layer.pop("shape")), tuple(layer.pop("tied_to"))
                layers.append(PackedLayer(choices=choices, shape=shape, tied_to=tied_to, **layer))
            skipped = tuple(SkippedLayer(**entry) for entry in table.pop("skipped"))
            notes, whole = tuple(table.pop("notes", ())), table.pop("whole", None)
            times = tuple(ModelTime(**entry) for entry in table.pop("times", ()))
            return cls(
                layers=tuple(layers),
                skipped=skipped,
                notes=notes,
                whole=None if whole is None else ModelWeights(**whole),
                times=times,
                **table,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a report of pack_: {error}") from None

    def _remarks(self) -> list[str]:
        """What to know beside the table, a sentence each."""
        return [f"{sentence(remark)}." for remark in (self.warning, *self.notes) if remark]

    def to_markdown(self) -> str:
        """Return the summary and a table of layers as Markdown."""
        lines = [f"{sentence(line)}." for line in self._lines()]
        parts = ["# Packing report", *lines, f"Measured on: {markdown_text(self._machine())}."]
        parts += self._remarks()
        return "\n\n".join(parts + [table.to_markdown() for table in self.tables() if table.rows]) + "\n"

    def tables(self) -> tuple[Table, ...]:
        """Return the tables of the report: of the whole model, of the layers with zeros, and of what was left alone."""
        return model_times_table(self.times), packed_table(self.layers), skipped_table(self.skipped)

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        facts = (
            Fact(
                "Layers packed", str(sum(layer.packed for layer in self.layers)), f"of {len(self.layers)}{self._which}"
            ),
            Fact("Bytes stored", f"{self.stored_bytes:,}", f"of {self.dense_bytes:,} dense"),
            Fact("Bytes while running", f"{self.resident_bytes:,}", "stored, and what kernels keep besides"),
            Fact("Time", f"{self.seconds:.1f} s"),
        )
        lead = [f"{sentence(line)}." for line in (self.first_line, self._error) if line]
        lead += [f"Measured on: {self._machine()}.", *self._remarks()]
        return tables_page("Packing report", lead, facts, self.tables())

    def _machine(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.machine.items())


def _choice(table: dict[str, Any]) -> Choice:
    if "route" not in table and "way" in table:  # what 0.1.0 called it
        table["route"] = table.pop("way")
    return Choice(**table)
