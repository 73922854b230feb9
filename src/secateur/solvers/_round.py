"""Round the weights that are kept to a grid, and let the columns still to come make up for it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from secateur._checks import one_of
from secateur._types import Weight
from secateur.formats import GRIDS, Grid
from secateur.solvers._sweep import BLOCK, PANEL, compensate, open_block, to_columns, to_rows

ROUNDINGS = tuple(GRIDS)


def without_none(settings: Any) -> str:
    """Return the repr of a dataclass without its fields that are None: as it was before it had them."""
    shown = [f"{f.name}={value!r}" for f in fields(settings) if (value := getattr(settings, f.name)) is not None]
    return f"{type(settings).__name__}({', '.join(shown)})"


def check_rounding(rounding: str | None) -> None:
    """Check the name of a grid; None is not to round.

    Raises:
        RecipeError: there is no such grid.
    """
    if rounding is not None:
        one_of("rounding", rounding, ROUNDINGS)


def round_columns(weight: Weight, factor: Tensor, rounding: str) -> Weight:
    r"""Return a weight on a grid that is near another one: :math:`\min_Q \lVert (V - Q) X \rVert^2`, greedily.

    Columns are swept. Each is rounded at once, and its error is made up for by all columns still to come, as if they
    were free.

    Args:
        weight: ``[out, in]``, V, from which the scales are chosen. What is zero stays zero.
        factor: of the damped Gram matrix, as :func:`upper_factor` gives it.
        rounding: the name of the grid.
    """
    if not weight.numel():
        return weight.clone()
    places = _Places.of(weight, len(factor), GRIDS[rounding])
    dense = to_columns(weight, len(factor))
    removed = torch.empty_like(dense)
    result = torch.empty_like(dense)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        inverse, current = open_block(dense, removed, factor, start, stop)
        error = torch.empty_like(current)
        for panel in range(0, stop - start, PANEL):
            end = min(panel + PANEL, stop - start)
            compensate(current, error, inverse, 0, panel, end)
            for j in range(panel, end):
                compensate(current, error, inverse, panel, j, j + 1)
                result[:, start + j] = places.nearest(current[:, j], start + j)
                error[:, j] = (current[:, j] - result[:, start + j]) / inverse[:, j, j, None]
        removed[:, start:stop] = dense[:, start:stop] - result[:, start:stop]
    return to_rows(result)


def descend(rounded: Weight, dense: Weight, near: Weight, gram: Tensor, rounding: str, sweeps: int) -> Weight:
    r"""Return a weight on the same grid that is nearer: :math:`\min_Q \lVert (W - Q) X \rVert^2`, weight by weight.

    Each weight in turn moves to the place on the grid that is best while all others stay, which never raises the
    error. All rows are done at once.

    Args:
        rounded: ``[out, in]``, where to start: what :func:`round_columns` made of ``near``.
        dense: W, what is to be approximated.
        near: what the scales were chosen from. What is zero there stays zero.
        gram: the damped Gram matrix, ``[groups, in, in]``.
        rounding: the name of the grid.
        sweeps: over all columns; it ends earlier where nothing moves any more.
    """
    if not rounded.numel():
        return rounded.clone()
    places = _Places.of(near, len(gram), GRIDS[rounding])
    result = to_columns(rounded, len(gram))
    lost = to_columns(dense, len(gram)) - result
    curvature = gram.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        moved = False
        for start in range(0, dense.shape[1], BLOCK):
            stop = min(start + BLOCK, dense.shape[1])
            here = gram[:, start:stop, start:stop]
            slope = gram[:, start:stop] @ lost  # of the error, halved, at what the columns are now
            change = torch.zeros_like(slope)
            for panel in range(0, stop - start, PANEL):
                end = min(panel + PANEL, stop - start)
                compensate(slope, change, here, 0, panel, end)
                for j in range(panel, end):
                    compensate(slope, change, here, panel, j, j + 1)
                    before = result[:, start + j]
                    best = before + slope[:, j] / curvature[:, start + j, None]
                    nearest = places.nearest(best, start + j)
                    torch.sub(nearest, before, out=change[:, j])
                    result[:, start + j] = nearest  # adding the change might miss the grid by a rounding
            lost[:, start:stop] -= change
            moved = moved or bool(change.any())
        if not moved:
            break
    return to_rows(result)


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the weights of a layer may lie, with columns as ``[groups, in, rows]``.

    The largest weight of a row that has one scale keeps its place, and is a bfloat16 number. So packing, which finds
    the scale by the largest weight, finds the same grid, also where the model is stored in half precision.
    """

    grid: Grid
    steps: Tensor
    kept: Tensor
    largest: Tensor  # [groups, rows], the column
    extreme: Tensor  # [groups, rows], the weight there

    @classmethod
    def of(cls, weight: Weight, groups: int, grid: Grid) -> _Places:
        largest = weight.abs().argmax(1, keepdim=True)
        extreme = weight.gather(1, largest).bfloat16().to(weight)
        scales = grid.scales(weight if grid.group else extreme)
        steps = grid.spread(scales, weight.shape[1]).to(weight).expand_as(weight)
        rows = (groups, -1)
        return cls(
            grid, to_columns(steps, groups), to_columns(weight != 0, groups), largest.view(rows), extreme.view(rows)
        )

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The nearest place for each weight of a column, ``[groups, rows]``."""
        rounded = self.grid.round(values, self.steps[:, column]) * self.kept[:, column]
        return rounded if self.grid.group else torch.where(self.largest == column, self.extreme, rounded)
