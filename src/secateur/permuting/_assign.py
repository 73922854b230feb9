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
    row_potential, column_potential = np.zeros(size), costs.min(axis=0, initial=np.inf)
    row_of = np.full(size, -1)
    for row in range(size):
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
