"""Remove the columns of one unit after the other, each the cheapest when all others take over from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._checks import integer, number
from secateur._errors import PatternError
from secateur._types import Weight
from secateur.calibration import LayerStatistics
from secateur.solvers._gram import gram_for, inverse
from secateur.solvers._units import checked_units, costs_of

_DELAY = 128  # removed columns whose effect on the large matrices is kept apart, and then applied at once


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads units.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, ``[in, in]``, or ``[groups, in, in]`` of a grouped convolution.
        units: int64 ``[units, width]``: the columns that read each unit; in a grouped convolution, those of all groups.
    """

    weight: Weight
    gram: Tensor
    units: Tensor


def remove_columns(
    weight: Weight,
    gram: Tensor,
    units: Tensor,
    keep: int,
    *,
    damping: float = 0.01,
    per_step: int | None = None,
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return which units go, in order, when each time the one goes that costs least; and what they cost.

    As :func:`remove_units`, for one layer that reads the units.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, ``[in, in]``, or ``[groups, in, in]`` of a grouped convolution.
        units: int64 ``[units, width]``: the columns of each unit.
        keep: how many units stay.
        damping: added to the diagonal of the Gram matrix, as a fraction of its mean.
        per_step: units that go before all costs are computed again.
        group_size: units in a row of which as many go as of every other such group; 0 if any may go.

    Returns:
        int64 ``[units - keep]``, the units in the order in which they go; and float64 of the same length, the squared
        error of the output when that unit and all before it are gone, and the other columns are the best possible.

    Raises:
        PatternError: units that are not columns of the weight, or that overlap, or a ``keep`` that is not possible.
        StatisticsError: a gram that does not fit the weight.
        SolverError: the Gram matrix is not positive definite even with damping 1.

    Example:
        >>> import torch
        >>> from secateur.solvers import remove_columns
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.01, 0.0]])
        >>> order, costs = remove_columns(torch.ones(1, 3), x.T @ x, torch.tensor([[0], [1], [2]]), 1, damping=0.0)
        >>> order.tolist(), [round(cost, 3) for cost in costs.tolist()]  # the first two can replace each other: once
        ([0, 2], [0.0, 1.0])

    Reference:
        Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv:2302.04089.
    """
    reader = Reader(weight, gram, units)
    return remove_units([reader], keep, damping=damping, per_step=per_step, group_size=group_size)


@torch.no_grad()
def remove_units(
    readers: Sequence[Reader],
    keep: int,
    *,
    damping: float = 0.01,
    per_step: int | None = None,
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return which units go, in order, where several layers read them; and what they cost in all layers together.

    After each removal, ``H^-1`` and the weights are those of the layer without the removed columns, so that each cost
    is exact, and the last one is the error of a least-squares fit of all that is left.

    Cost, in float64: an inverse and a product of ``[in, in]``, and ``O(in^2)`` for each removed column. Memory: six
    matrices ``[in, in]``.

    Args:
        readers: the layers, with the same number of units each.
        keep: how many units stay.
        damping: added to the diagonal of each Gram matrix, as a fraction of its mean.
        per_step: units that go before all costs are computed again. By default 1. More is faster where units are wide,
            and there are many; the costs that are returned are exact anyway.
        group_size: units in a row of which as many go as of every other such group; 0 if any may go.

    Returns:
        As :func:`remove_columns`.

    Raises:
        PatternError: as :func:`remove_columns`, or readers of different numbers of units.
        StatisticsError: a gram that does not fit its weight.
        SolverError: a Gram matrix is not positive definite even with damping 1.

    Example:
        >>> import torch
        >>> from secateur.solvers import Reader, remove_units
        >>> units = torch.tensor([[0], [1]])
        >>> first = Reader(torch.tensor([[1.0, 2.0]]), torch.eye(2), units)
        >>> second = Reader(torch.tensor([[3.0, 1.0]]), torch.eye(2), units)
        >>> order, costs = remove_units([first, second], keep=1, damping=0.0)
        >>> order.tolist(), [round(cost, 3) for cost in costs.tolist()]  # 2 ** 2 + 1 ** 2
        ([1], [5.0])
    """
    number("damping", damping, 0)
    per_step = integer("per_step", 1 if per_step is None else per_step, 1)
    states = [state for reader in readers for state in _states(reader, damping)]
    count = len(states[0].units)
    if any(len(state.units) != count for state in states):
        raise PatternError(f"all readers must read the same units, got {[len(reader.units) for reader in readers]}.")
    group_size = integer("group_size", group_size, 0) or count
    groups = count // group_size
    if not 0 <= integer("keep", keep) <= count or count % group_size or (count - keep) % groups:
        raise PatternError(
            f"{keep} of {count} units, in {groups} groups of {group_size}, cannot stay.\n"
            f"Keep at most {count} units, and as many of each group."
        )
    barred = torch.zeros(count, dtype=torch.bool)  # has gone, or is of a group of which enough have gone
    left = [(count - keep) // groups] * groups
    order: list[int] = []
    costs: list[float] = []
    while len(order) < count - keep:
        total = torch.stack([state.costs() for state in states]).sum(0).masked_fill(barred, torch.inf)
        for unit in [int(total.argmin())] if per_step == 1 else total.argsort(stable=True)[:per_step].tolist():
            if barred[unit]:
                continue
            order.append(unit)
            costs.append((costs[-1] if costs else 0.0) + sum(state.remove(unit) for state in states))
            barred[unit] = True
            group = unit // group_size
            left[group] -= 1
            if not left[group]:
                barred[group * group_size : (group + 1) * group_size] = True
    gone = torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)
    return gone[0].to(readers[0].weight.device), gone[1].to(readers[0].weight.device)


def _states(reader: Reader, damping: float) -> list[_State]:
    """One state for each group of a layer."""
    weight = reader.weight.detach().double()
    gram = gram_for(weight, LayerStatistics(tokens=0, gram=reader.gram))
    units = checked_units(reader.units, weight.shape[1]).to(weight.device)
    return [_State(part, h, units, damping) for part, h in zip(weight.chunk(len(gram)), gram, strict=True)]


class _State:
    """``H^-1`` and ``M = W.T @ W`` as they are without the columns that were removed.

    To remove columns S subtracts ``L @ L.T`` from ``H^-1``, and ``L @ V.T + V @ L.T`` from M, where ``C @ C.T`` is
    ``(H^-1)_SS``, ``L = (H^-1)_:S C^-T``, and ``V = M_:S C^-T - L (C^-1 M_SS C^-T) / 2``. The weights themselves are
    not needed. Until many columns are removed, L and V are kept apart, and only what is read is updated.
    """

    def __init__(self, weight: Tensor, gram: Tensor, units: Tensor, damping: float) -> None:
        weight = weight * (gram.diagonal() != 0)  # what multiplies a dead input costs nothing
        self.units = units  # [units, width], as columns of the matrices
        self._inverse = inverse(gram, damping)
        self._products = weight.T @ weight
        size = max(_DELAY, units.shape[1])
        self._left = gram.new_zeros(size, len(gram))  # L.T, a row for each removed column that is not applied yet
        self._right = torch.zeros_like(self._left)  # V.T
        self._pending = 0
        self._identity = torch.eye(units.shape[1], dtype=gram.dtype, device=gram.device)
        here, there = units.unsqueeze(2), units.unsqueeze(1)
        self._inverse_blocks = self._inverse[here, there]  # [units, width, width], as they are now
        self._product_blocks = self._products[here, there]

    def costs(self) -> Tensor:
        """What each unit costs if it goes next, ``[units]``, on the CPU. That of a removed unit has no meaning."""
        return costs_of(self._inverse_blocks, self._product_blocks).cpu()

    def remove(self, unit: int) -> float:
        """Remove a unit, and return what it costs."""
        columns = self.units[unit]
        width = len(columns)
        if self._pending + width > len(self._left):
            self._apply()
        left, right = self._left[: self._pending], self._right[: self._pending]
        left_here, right_here = left.index_select(1, columns).T, right.index_select(1, columns).T
        rows = self._inverse.index_select(0, columns) - left_here @ left  # [width, in]
        products = self._products.index_select(0, columns) - left_here @ right - right_here @ left
        factor = torch.linalg.cholesky(rows.index_select(1, columns))
        root = torch.linalg.solve_triangular(factor, self._identity, upper=False)  # C^-1
        new_left, new_right = root @ rows, root @ products
        inner = new_right.index_select(1, columns) @ root.T
        new_right -= inner @ new_left / 2
        self._left[self._pending : self._pending + width] = new_left
        self._right[self._pending : self._pending + width] = new_right
        self._pending += width
        ours, theirs = (
            new.T.index_select(0, self.units.flatten()).view(*self.units.shape, width) for new in (new_left, new_right)
        )
        self._inverse_blocks -= ours @ ours.mT
        change = ours @ theirs.mT
        self._product_blocks -= change + change.mT
        return max(0.0, float(inner.diagonal().sum()))

    def _apply(self) -> None:
        """Apply all that was kept apart."""
        left, right = self._left[: self._pending], self._right[: self._pending]
        self._inverse.addmm_(left.T, left, alpha=-1)
        self._products.addmm_(left.T, right, alpha=-1)
        self._products.addmm_(right.T, left, alpha=-1)
        self._pending = 0
