"""What packing a model did: data, and the ways to write it down. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median

from secateur.reports._pruning import SkippedLayer, cell

_BUSY = 1.5  # upper over lower quartile; a quiet machine stays below 1.2


@dataclass(frozen=True)
class Choice:
    """How one layer runs at one batch.

    Args:
        rows: input rows it was measured with; pixels for a convolution.
        way: that won, such as ``bitmask`` or ``panels:128x256``; ``dense`` where the layer stayed.
        ratio: time of the dense layer over its own, the median of pairs measured in turn; above 1 is faster.
        low: lower quartile of those pairs.
        high: upper quartile.
        seconds: median time of a call.
        dense_seconds: the same of the dense layer.
        prepacked_seconds: the same of the dense layer with its weight in oneDNN's own order, None if there is none.
    """

    rows: int
    way: str
    ratio: float
    low: float
    high: float
    seconds: float
    dense_seconds: float
    prepacked_seconds: float | None


@dataclass(frozen=True)
class PackedLayer:
    """What happened to one layer.

    Args:
        name: qualified name of the module.
        shape: of the weight as a matrix, ``(out, in)``.
        pattern: that its zeros follow, as text.
        density: stored weights over all weights.
        format: that holds it, by its name in files.
        value_dtype: of the stored values.
        error: ``‖packed - dense‖ / ‖dense‖``, what fewer bits cost; 0 where nothing.
        dense_bytes: of the dense weight.
        stored_bytes: of the packed weight.
        runtime_bytes: that kernels keep besides it.
        packed: False where the layer stayed dense.
        reason: why it stayed dense; empty where it did not.
        choices: by rows; empty where nothing was measured.
        tied_to: other modules that share the weight.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float
    format: str
    value_dtype: str
    error: float
    dense_bytes: int
    stored_bytes: int
    runtime_bytes: int
    packed: bool
    reason: str
    choices: tuple[Choice, ...]
    tied_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackReport:
    """What :func:`pack_` did to a model.

    Args:
        layers: those that have zeros, packed or not.
        skipped: modules with parameters that were left alone.
        machine: what the measurements hold for: processor, instruction set, threads, versions.
        memory: how many times its dense bytes a layer's run-time layouts might take.
        seconds: that packing took.
        notes: what else is worth knowing, such as where the patterns come from.
    """

    layers: tuple[PackedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    machine: Mapping[str, str]
    memory: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Of all layers with zeros, dense."""
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

    def __str__(self) -> str:
        packed = sum(layer.packed for layer in self.layers)
        return (
            f"packed {packed} of {len(self.layers)} layers with zeros, skipped {len(self.skipped)} modules; "
            f"{self.dense_bytes:,} bytes dense, {self.stored_bytes:,} stored, {self.resident_bytes:,} while running; "
            f"{self.seconds:.1f} s"
        )

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PackReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON or not such a report.
        """
        try:
            table = json.loads(text)
            layers = []
            for layer in table.pop("layers"):
                choices = tuple(Choice(**choice) for choice in layer.pop("choices"))
                shape, tied_to = tuple(layer.pop("shape")), tuple(layer.pop("tied_to"))
                layers.append(PackedLayer(choices=choices, shape=shape, tied_to=tied_to, **layer))
            skipped = tuple(SkippedLayer(**entry) for entry in table.pop("skipped"))
            notes = tuple(table.pop("notes", ()))
            return cls(layers=tuple(layers), skipped=skipped, notes=notes, **table)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a report of pack_: {error}") from None

    def to_markdown(self) -> str:
        """Return the summary and a table of layers as Markdown."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"# Packing report\n\n{str(self).capitalize()}.\n\nMeasured on: {cell(machine)}.\n"]
        lines += [f"{self.warning[0].upper()}{self.warning[1:]}.\n"] if self.warning else []
        lines += ["| layer | shape | pattern | density | format | values | error | bytes | running | speed |"]
        lines += ["|" + "---|" * 10]
        for layer in self.layers:
            size = f"{layer.shape[0]} x {layer.shape[1]} | {cell(layer.pattern)} | {layer.density:.1%}"
            kept = layer.stored_bytes if layer.packed else layer.dense_bytes
            share = f"{kept / layer.dense_bytes:.2f}" if layer.dense_bytes else ""
            running = (kept + layer.runtime_bytes * layer.packed) / max(layer.dense_bytes, 1)
            what = f"{layer.format} | {layer.value_dtype} | {layer.error:.2g}" if layer.packed else "dense | | "
            lines.append(f"| {cell(layer.name)} | {size} | {what} | {share} | {running:.2f} | {cell(speeds(layer))} |")
        if self.skipped:
            lines += ["\n| skipped | kind | reason |", "|---|---|---|"]
            lines += [f"| {cell(s.name) or '(root)'} | {cell(s.kind)} | {cell(s.reason)} |" for s in self.skipped]
        return "\n".join(lines) + "\n"


def speeds(layer: PackedLayer) -> str:
    """Return what a layer gained at each batch in a line of text, or why it stayed dense."""
    if not layer.packed:
        return layer.reason
    return ", ".join(
        f"{choice.rows}: {choice.ratio:.2f} ({choice.low:.2f}-{choice.high:.2f}) {choice.way}"
        for choice in layer.choices
    )
