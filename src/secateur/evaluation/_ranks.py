"""Rank correlation, exact, in O(n log n)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value from 1 on, float64 ``[n]``; equal values share the mean of their ranks.

    Args:
        values: ``[n]``.

    Example:
        >>> import torch
        >>> from secateur.evaluation import ranks
        >>> ranks(torch.tensor([0.5, 0.1, 0.5]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)  # the highest rank of each value
    found: Tensor = (last - (counts - 1) / 2)[inverse]
    return found


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two series: the correlation of their ranks, ties averaged, in float64.

    NaN if either has a value that is not finite, or only one value, which has no order.

    Args:
        first: ``[n]``.
        second: ``[n]``.

    Example:
        >>> import torch
        >>> from secateur.evaluation import spearman
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]))
        1.0

    Reference:
        C. Spearman, "The Proof and Measurement of Association between Two Things", 1904.
    """
    if not (first.isfinite().all() and second.isfinite().all()):
        return math.nan
    x, y = ranks(first), ranks(second)
    x, y = x - x.mean(), y - y.mean()
    # All three sums are made alike, and one root is drawn: equal ranks give exactly 1.
    product = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    if product == 0:
        return math.nan
    return min(max(float((x * y).sum()) / product, -1.0), 1.0)


def pair_cosines(embeddings: Tensor) -> Tensor:
    """Return the cosines of all pairs of different rows, float64 ``[n * (n - 1) / 2]``.

    Args:
        embeddings: ``[n, width]``. The cosine with a row of zeros is 0.
    """
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    rows, columns = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[rows, columns]


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each row with the row of the other, float64 ``[n]``; 0 where one is zeros."""
    unit = (torch.nn.functional.normalize(rows.double(), dim=-1) for rows in (first, second))
    return torch.mul(*unit).sum(-1)
