"""The figures of a report on one layer, computed from its weights and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._errors import StatisticsError
from secateur._types import Weight
from secateur.calibration import LayerStatistics
from secateur.layers import Layer
from secateur.reports import LayerReport, empty_rows, histogram, thumbnail
from secateur.solvers import LayerProblem, Solution
from secateur.zeros import parameter_names


def layer_report(
    layer: Layer,
    problem: LayerProblem,
    solution: Solution,
    seconds: float,
    held_out: LayerStatistics | None = None,
) -> LayerReport:
    """Return what was done to a layer whose solution has been written to the model.

    Args:
        layer: that was pruned.
        problem: with the dense weight.
        solution: that was written.
        seconds: that solving and writing took.
        held_out: of inputs that nothing was learned from, with their Gram matrix; None if there are none.
    """
    dense, statistics = problem.weight, problem.statistics
    stored = layer.matrix()
    pruned = int((~solution.mask).count_nonzero())
    return LayerReport(
        name=layer.name,
        shape=(dense.shape[0], dense.shape[1]),
        pattern=str(solution.pattern or problem.pattern),
        asked=problem.pattern.resolve(problem.sparsity),
        sparsity=pruned / max(1, dense.numel()),
        pruned=pruned,
        zeros=stored.numel() - int(stored.count_nonzero()),
        relative_error=relative_error(dense, stored.to(dense), statistics),
        tokens=None if statistics is None else statistics.tokens,
        dead_inputs=dead_inputs(statistics),
        seconds=seconds,
        tied_to=layer.tied_to,
        notes=(*solution.notes, *_dense_remainder(problem)),
        histogram=histogram(solution.scores, solution.mask),
        thumbnail=thumbnail(solution.mask),
        parameters=parameter_names(layer),
        empty_rows=empty_rows(stored),
        held_out_error=relative_error(dense, stored.to(dense), held_out),
    )


def _dense_remainder(problem: LayerProblem) -> tuple[str, ...]:
    """What is beyond the last whole group or tile of the pattern."""
    units = problem.pattern.units(problem.weight.shape)
    left = [
        f"its last {size - core} {side}{'s' if size - core > 1 else ''}"
        for size, core, side in zip(units.shape, units.core, ("row", "column"), strict=True)
        if size > core
    ]
    if not left:
        return ()
    count = units.shape[0] * units.shape[1] - units.core[0] * units.core[1]
    return (f"{' and '.join(left)} stayed dense ({count:,} weights), because {problem.pattern} does not divide them",)


def relative_error(dense: Weight, stored: Weight, statistics: LayerStatistics | None) -> float | None:
    """``norm((W - V) X) / norm(W X)`` from the Gram matrix; None where it was not gathered or W X is zero."""
    if statistics is None or statistics.gram is None:
        return None
    output = squared_error(dense, torch.zeros_like(dense), statistics)
    return (squared_error(dense, stored, statistics) / output) ** 0.5 if output > 0 else None


def squared_error(dense: Weight, stored: Weight, statistics: LayerStatistics | None) -> float:
    """``norm((W - V) X) ** 2`` from the Gram matrix.

    Raises:
        StatisticsError: it was not gathered.
    """
    if statistics is None:
        raise StatisticsError("it needs calibration inputs: pass batches.")
    gram = statistics.require("gram").to(dense)
    change = (dense - stored).reshape(len(gram), -1, dense.shape[1])
    return max(float(((change @ gram) * change).sum(dtype=torch.float64)), 0.0)


def dead_inputs(statistics: LayerStatistics | None) -> int | None:
    """How many inputs were zero on every token; None where nothing was gathered that tells."""
    if statistics is None:
        return None
    energy: Tensor | None = statistics.input_norm
    if statistics.gram is not None:
        energy = statistics.require("gram").diagonal(dim1=1, dim2=2)
    return None if energy is None else int((energy == 0).sum())
