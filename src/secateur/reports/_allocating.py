"""How zeros would be shared out among the layers of a model, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.reports._html import Fact, tables_page
from secateur.reports._tables import Table, TableColumn, markdown_text, sentence, size

_BAR = 20  # characters for a sparsity of 1
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


@dataclass(frozen=True)
class AllocatedLayer:
    """What one layer would lose.

    Args:
        name: qualified name.
        shape: ``(out, in)`` of its weight.
        pattern: it would be pruned to; ``"dense"`` for a layer that gets none where N:M fixes what the others lose.
        sparsity: what it would be pruned to.
        weights: that the pattern may prune at all: all but a dense remainder.
        pruned: weights that would go.
        error: the relative error of its output at this sparsity, read off the error curve of a method like the one
            asked for; None where no curve was computed.
        effect: how far the output of the whole model would move, if only this layer were pruned to it; None as above.
        tied_to: other layers that share the weight, which counts once.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    weights: int
    pruned: int
    error: float | None = None
    effect: float | None = None
    tied_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class AllocationReport:
    """How zeros would be shared out among layers. Nothing was changed.

    Args:
        layers: in the order of the model.
        recipe: the recipe, as the table that ``Recipe.from_dict`` reads.
        sparsity: of all layers together that was asked for.
        budget: weights that it stands for.
        seconds: that it took.
        calibration_hash: SHA-256 over the calibration batches, None without any.
        notes: what a reader should know, such as a budget that whole layers do not meet exactly.
    """

    layers: tuple[AllocatedLayer, ...]
    recipe: Mapping[str, Any]
    sparsity: float
    budget: int
    seconds: float
    calibration_hash: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """Sparsity of each layer, by its name."""
        return {layer.name: layer.sparsity for layer in self.layers}

    @property
    def num_pruned(self) -> int:
        """Weights that would go."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def num_weights(self) -> int:
        """Weights of the layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def table(self) -> Table:
        """A row for each layer: its weights, its sparsity and a picture of it, and the error that is to be expected."""
        headings = ("shape", "weights", "pruned", "sparsity")
        columns = (
            TableColumn("layer", is_name=True),
            *(TableColumn(heading, is_number=True) for heading in headings),
            TableColumn("0 to 1"),
            TableColumn("pattern"),
            TableColumn("relative error", is_number=True),
            TableColumn("effect on output", is_number=True),
        )
        rows = tuple(
            (
                layer.name or "(root)",
                size(layer.shape),
                f"{layer.weights:,}",
                f"{layer.pruned:,}",
                f"{layer.sparsity:.2%}",
                bar(layer.sparsity),
                layer.pattern,
                "" if layer.error is None else f"{layer.error:.4f}",
                "" if layer.effect is None else f"{layer.effect:.3g}",
            )
            for layer in self.layers
        )
        return Table("What each layer would lose", columns, rows, notes=self.notes)

    def _lines(self) -> list[str]:
        shares = [layer.sparsity for layer in self.layers]
        off = self.num_pruned - self.budget
        met = "to the weight" if not off else f"{abs(off):,} weights {'more' if off > 0 else 'fewer'} than asked for"
        return [
            f"{self.recipe['allocation']}: {self.num_pruned:,} of {self.num_weights:,} weights in {len(self.layers)} "
            f"layers would be pruned, {met}; each layer between {min(shares):.2%} and {max(shares):.2%}",
            f"{self.seconds:.1f} s, nothing was changed",
        ]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        longest = max(len(layer.name) for layer in self.layers)
        rows = [f"{row.name:{longest}} {row.sparsity:8.2%} {bar(row.sparsity)}".rstrip() for row in self.layers]
        return "\n".join([*rows, str(self)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists, with the totals."""
        totals = {"weights": self.num_weights, "pruned": self.num_pruned, "budget": self.budget}
        return asdict(self) | {"totals": totals}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict())

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        lines = (f"{sentence(markdown_text(line))}." for line in self._lines())
        return "\n\n".join(["# Allocation", *lines, self.table.to_markdown()]) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        facts = [
            Fact("Layers", f"{len(self.layers):,}"),
            Fact("Weights", f"{self.num_weights:,}"),
            Fact("Would be pruned", f"{self.num_pruned:,}"),
        ]
        return tables_page("Allocation", [f"{sentence(line)}." for line in self._lines()], facts, [self.table])


def bar(part: float) -> str:
    """Return a bar for a part of 1, of up to 20 characters.

    Example:
        >>> from secateur.reports import bar
        >>> bar(0.5), bar(0.11)
        ('██████████', '██▎')
    """
    eighths = round(part * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
