"""The rows of every report, made once: for Markdown, a terminal and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from secateur.reports._records import Comparison, Evaluation, LayerReport, ModelTime, PackedLayer, SkippedLayer
from secateur.reports._tables import Table, TableColumn, bars, figure, size

_COUNTED = {"spearman": "pairs", "accuracy": "texts"}  # what other figures than those of running text are measured on


def pruned_table(layers: Sequence[LayerReport]) -> Table:
    """Return a table with a row for each layer, in the order given, and a section for each block of the model."""
    errors = [layer.relative_error for layer in layers]
    held_out = [layer.held_out_error for layer in layers]
    seen = any(error is not None for error in held_out)
    columns = (
        TableColumn("layer"),
        TableColumn("shape", is_number=True),
        TableColumn("pattern"),
        TableColumn("asked", is_number=True),
        TableColumn("sparsity", is_number=True, bars=bars([layer.sparsity for layer in layers], longest=1.0)),
        TableColumn("relative error", is_number=True, bars=bars(errors)),
        *([TableColumn("held-out error", is_number=True, bars=bars(held_out))] if seen else []),
        TableColumn("dead inputs", is_number=True),
        TableColumn("seconds", is_number=True),
        TableColumn("notes", is_note=True),
    )
    rows = tuple(
        (
            layer.name or "(root)",
            size(layer.shape),
            layer.pattern,
            f"{layer.asked:.4g}",
            f"{layer.sparsity:.2%}",
            "" if layer.relative_error is None else f"{layer.relative_error:.4f}",
            *(["" if layer.held_out_error is None else f"{layer.held_out_error:.4f}"] if seen else []),
            "" if layer.dead_inputs is None else f"{layer.dead_inputs:,}",
            f"{layer.seconds:.2f}",
            "; ".join((*(f"shared with {name}" for name in layer.tied_to), *layer.remarks)),
        )
        for layer in layers
    )
    sections = []
    for _, members in groupby(enumerate(layers), lambda pair: block_of(pair[1].name)):
        first, *others = members
        sections += [first[0]] if others else []
    return Table("Layers in the order pruned", columns, rows, sections=tuple(sections))


def block_of(name: str) -> str:
    """Return the repeated block that a layer belongs to: its name up to the first number that is followed by more."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


def skipped_table(skipped: Sequence[SkippedLayer]) -> Table:
    """Return a table with a row for each module that was left as it is."""
    rows = tuple(
        (entry.name or "(root)", entry.kind, f"{entry.weights:,}" if entry.weights else "", entry.reason)
        for entry in skipped
    )
    columns = (
        TableColumn("skipped"),
        TableColumn("kind"),
        TableColumn("weights", is_number=True),
        TableColumn("reason"),
    )
    return Table("Modules that were skipped", columns, rows)


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return a table with one row, for the metric."""
    headings = (_COUNTED.get(evaluation.metric, "tokens"), "before", "after", "after / before")
    columns = (TableColumn("metric"), *(TableColumn(heading, is_number=True) for heading in headings))
    before, after = evaluation.before, evaluation.after
    row = (evaluation.metric, f"{evaluation.tokens:,}", figure(before), figure(after), _ratio(after, before))
    return Table("Quality before and after", columns, (row,))


def comparison_table(runs: Sequence[Comparison]) -> Table:
    """Return a table with a row for each run. The targets are its sections; the best run of each stands out."""
    headings = ("sparsity", "before", "after", "after / before", "mean layer error", "seconds")
    columns = (
        TableColumn("method"),
        TableColumn("target"),
        *(TableColumn(heading, is_number=True) for heading in headings),
    )
    best: dict[str, float] = {}
    for run in runs:
        if math.isfinite(run.after):
            best[run.target] = min(run.after, best.get(run.target, math.inf))
    rows = tuple(
        (
            run.method,
            run.target,
            f"{run.sparsity:.2%}",
            figure(run.before),
            figure(run.after),
            _ratio(run.after, run.before),
            "" if run.error is None else f"{run.error:.4f}",
            f"{run.seconds:.1f}",
        )
        for run in runs
    )
    sections = tuple(index for index, run in enumerate(runs) if not index or run.target != runs[index - 1].target)
    strong = tuple((index, 4) for index, run in enumerate(runs) if run.after == best.get(run.target))
    title = "Perplexity before and after; the lowest of each target stands out"
    return Table(title, columns, rows, sections=sections, strong=strong)


def packed_table(layers: Sequence[PackedLayer]) -> Table:
    """Return a table with a row for each layer that was considered."""
    seen = any(layer.output_error is not None for layer in layers)
    numbers = {"shape", "density", "error", "outputs", "bytes", "running"}
    headings = ["layer", "shape", "pattern", "density", "format", "values", "products", "error", "outputs", "bytes"]
    headings = [heading for heading in (*headings, "running", "speed") if seen or heading != "outputs"]
    rows = []
    for layer in layers:
        outputs = f"{layer.output_error:.2g}" if layer.packed and layer.output_error is not None else ""
        kept = layer.stored_bytes if layer.packed else layer.dense_bytes
        running = kept + layer.runtime_bytes * layer.packed
        rows.append(
            (
                layer.name or "(root)",
                f"{layer.matrices} of {size(layer.shape)}" if layer.matrices > 1 else size(layer.shape),
                layer.pattern,
                f"{layer.density:.1%}",
                layer.format if layer.packed else "dense",
                layer.value_dtype if layer.packed else "",
                layer.precision if layer.packed else "",
                f"{layer.error:.2g}" if layer.packed else "",
                *([outputs] if seen else []),
                f"{kept / layer.dense_bytes:.2f}" if layer.dense_bytes else "",
                f"{running / layer.dense_bytes:.2f}" if layer.dense_bytes else "",
                _speeds(layer),
            )
        )
    columns = tuple(TableColumn(heading, is_number=heading in numbers) for heading in headings)
    notes = (
        "bytes, running: what is stored, and what is in memory while the layer runs, in multiples of its dense bytes.",
        "products, error: the arithmetic, and the relative error of the weight"
        + ("; outputs: the relative error of the layer's outputs on the given inputs." if seen else "."),
        "speed: input rows, the dense layer's time over its own, the quartiles of that ratio, milliseconds, the route.",
    )
    return Table("Layers", columns, tuple(rows), notes)


def model_times_table(times: Sequence[ModelTime]) -> Table:
    """Return a table with a row for each input that the whole model was timed with."""
    headings = ("before, ms", "after, ms", "times as fast", "quartiles")
    columns = (TableColumn("the whole model at"), *(TableColumn(heading, is_number=True) for heading in headings))
    rows = tuple(
        (time.shape, figure(time.before), figure(time.after), f"{time.ratio:.2f}", f"{time.low:.2f}-{time.high:.2f}")
        for time in times
    )
    return Table("The whole model before and after", columns, rows)


def _speeds(layer: PackedLayer) -> str:
    """What a layer gained at each batch in a line of text, or why it stayed dense."""
    if not layer.packed:
        return layer.reason
    return ", ".join(
        f"{choice.rows}: {choice.ratio:.2f} ({choice.low:.2f}-{choice.high:.2f}) {figure(1e3 * choice.seconds)} ms "
        f"{choice.route}"
        for choice in layer.choices
    )


def _ratio(after: float, before: float) -> str:
    return figure(after / before) if before else ""
