"""What could be removed from a model, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from secateur.reports._html import Fact, tables_page
from secateur.reports._shrink_records import Boundary, ModelSize, RemovableDimension
from secateur.reports._shrink_rows import blocked_table, removable_table
from secateur.reports._tables import Table, sentence


@dataclass(frozen=True)
class ShrinkAnalysis:
    """What could be removed from a model. Nothing was.

    Args:
        model_name: the class of the model.
        model_hash: SHA-256 of the names and shapes of its tensors.
        dimensions: of which units can be removed.
        boundaries: dimensions of tensors that cannot be made smaller.
        size: of the whole model.
        seconds: that it took to find them.
    """

    model_name: str
    model_hash: str
    dimensions: tuple[RemovableDimension, ...]
    boundaries: tuple[Boundary, ...]
    size: ModelSize
    seconds: float

    @property
    def tables(self) -> tuple[Table, ...]:
        """What can be removed, and what cannot."""
        return removable_table(self.dimensions, self.size.parameters), blocked_table(self.boundaries)

    def _lines(self) -> list[str]:
        macs = "" if self.size.macs is None else f", {self.size.macs:,} multiply-adds"
        shape = f" for an input of {' x '.join(map(str, self.size.shape))}" if macs else ""
        lines = [f"{self.model_name}: {self.size.parameters:,} parameters, {self.size.nbytes:,} bytes{macs}{shape}"]
        if not self.dimensions:
            lines.append("nothing can be removed from it")
        return [*lines, f"{self.seconds:.1f} s, nothing was changed"]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_json(self) -> str:
        """Return the analysis as JSON text."""
        return json.dumps(asdict(self))

    def to_markdown(self) -> str:
        """Return the analysis as Markdown."""
        parts = ["# What can be removed", *(f"{line}." for line in self._lines())]
        return "\n\n".join(parts + [table.to_markdown() for table in self.tables if table.rows]) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        facts = [
            Fact("Parameters", f"{self.size.parameters:,}"),
            Fact("Dimensions that can shrink", f"{len(self.dimensions):,}"),
            Fact("Dimensions that cannot", f"{len(self.boundaries):,}"),
        ]
        return tables_page("What can be removed", [f"{sentence(line)}." for line in self._lines()], facts, self.tables)
