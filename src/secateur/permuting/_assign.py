"""Assign each of some things to one of as many places, so that the sum of values is largest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each column of a square matrix the row that it gets, each row once, with the largest sum.

    Shortest augmenting paths with potentials, O(n^3), exact. The order in which rows are added is fixed, so that equal
    matrices have equal results.

    Args:
        values: ``[n, n]``, finite.

    Example:
        >>> import numpy as np
        >>> from secateur.permuting._assign import assign
        >>> assign(np.array([[3.0, 2.0], [2.0, 0.0]])).tolist()  # 2 + 2 is more than 3 + 0
        [1, 0]
    """
    size = len(values)
    costs = values.max(initial=0.0) - values
    column_potential = costs.min(axis=0, initial=np.inf)
    row_potential = (costs - column_potential).min(axis=1, initial=np.inf)
    row_of = np.full(size, -1)
    waiting = []
    for row, column in enumerate((costs - column_potential).argmin(axis=1) if size else ()):
        if row_of[column] < 0:
            row_of[column] = row  # most rows get what is best for them at once
        else:
            waiting.append(row)
    for row in waiting:
        shortest = costs[row] - row_potential[row] - column_potential
        before = np.full(size, -1)  # the column from which a column was reached; -1 from the new row
        is_open = np.ones(size, dtype=bool)
        closed: list[tuple[int, float]] = []
        while True:
            column = int(np.where(is_open, shortest, np.inf).argmin())
            length = float(shortest[column])
            is_open[column] = False
            other = int(row_of[column])
            if other < 0:
                break
            closed.append((column, length))
            through = length + costs[other] - row_potential[other] - column_potential
            better = is_open & (through < shortest)
            shortest[better], before[better] = through[better], column
        row_potential[row] += length
        for there, distance in closed:
            row_potential[row_of[there]] += length - distance
            column_potential[there] -= length - distance
        while column >= 0:
            previous = int(before[column])
            row_of[column] = row if previous < 0 else row_of[previous]
            column = previous
    return row_of
