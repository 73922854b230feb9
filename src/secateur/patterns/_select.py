"""Which units are kept: exact counts, stable ties, and the value that separates the kept from the pruned."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def units_to_prune(units: int, sparsity: float) -> int:
    """The one place that turns a fraction into a count."""
    return round(sparsity * units)


def keep_top(scores: Tensor, num_keep: int) -> Tensor:
    """True for the ``num_keep`` largest of each row of ``[competitions, units]``; of equals, the first."""
    if num_keep == 0 or num_keep == scores.shape[1] or not scores.numel():
        return torch.full(scores.shape, num_keep > 0, dtype=torch.bool, device=scores.device)
    if scores.shape[1] <= _NARROW:
        return _keep_top_narrow(scores, num_keep)
    return _keep_top_wide(scores, num_keep)


# Up to this many units all pairs are compared: regular passes over memory, which beat selection for short rows.
_NARROW = 32
_CHUNK = 1 << 20  # elements worked on at a time, so that intermediates stay in cache


def _keep_top_narrow(scores: Tensor, num_keep: int) -> Tensor:
    size = scores.shape[1]
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part, out in zip(scores.split(_CHUNK // size), keep.split(_CHUNK // size), strict=True):
        # How many others outrank each unit, less num_keep: first all later units, less one for each that it beats.
        excess = [part.new_full((len(part),), size - 1 - i - num_keep, dtype=torch.int8) for i in range(size)]
        for i in range(size):
            for j in range(i + 1, size):
                first_wins = (part[:, i] >= part[:, j]).view(torch.int8)  # the lower index wins a tie
                excess[i] -= first_wins
                excess[j] += first_wins
        for i in range(size):
            torch.signbit(excess[i], out=out[:, i])  # negative is kept; vectorised, where a comparison is not
    return keep


def _keep_top_wide(scores: Tensor, num_keep: int) -> Tensor:
    threshold = kth_smallest(scores, scores.shape[1] - num_keep + 1)  # the lowest score that is kept
    keep = scores >= threshold
    counts = keep.count_nonzero().view(1) if len(keep) == 1 else keep.sum(1)  # the first is several times faster
    excess = counts - num_keep  # ties at the threshold beyond what may be kept
    for row in excess.nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        keep[row, ties[len(ties) - int(excess[row]) :]] = False
    return keep


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of each row, ``[rows, 1]``."""
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # On a CPU torch's selection takes quadratic time on sorted rows; numpy's does not, and is vectorised.
    return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())


@torch.no_grad()
def cut_between(scores: Tensor, num_pruned: int, near: float | None = None) -> Tensor:
    """The value halfway between the highest pruned and the lowest kept unit of each competition.

    Args:
        scores: ``[competitions, units]``, finite and not negative.
        num_pruned: units to prune in each competition.
        near: where the value may be expected if there is one competition, such as where it was a step ago. It saves
            time and never changes the result.

    Returns:
        ``[competitions, 1]``; -inf where nothing and inf where everything is pruned.
    """
    competitions, units = scores.shape
    if num_pruned in (0, units):
        return scores.new_full((competitions, 1), math.inf if num_pruned else -math.inf)
    if units <= _NARROW:
        return torch.cat([_cut_narrow(part, num_pruned) for part in scores.split(_CHUNK // units)])
    if scores.device.type != "cpu":
        highest_pruned = scores.kthvalue(num_pruned, dim=1, keepdim=True).values
        lowest_kept = scores.kthvalue(num_pruned + 1, dim=1, keepdim=True).values
        return _between(highest_pruned, lowest_kept)
    values = scores.numpy()
    if competitions == 1 and near is not None:
        values, num_pruned = _around(values, num_pruned, near)
    parted = np.partition(values, num_pruned, axis=1)
    highest = torch.from_numpy(parted[:, :num_pruned].max(1, keepdims=True))
    lowest = torch.from_numpy(parted[:, num_pruned : num_pruned + 1].copy())
    return _between(highest, lowest)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """The middle; between neighbours among floats, which have none, the higher one, so that ``>=`` tells them apart."""
    middle = low + (high - low) / 2
    return torch.where(middle > low, middle, high)


def _cut_narrow(scores: Tensor, num_pruned: int) -> Tensor:
    columns = list(scores.unbind(1))
    units = len(columns)
    if (units, num_pruned) == (4, 2):  # the two in the middle are the winner of the losers and the loser of the winners
        a, b, c, d = columns
        low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    else:
        # A network of comparators on whole columns: regular passes over memory, as for masks.
        for passes in range(units - 1, num_pruned - 2, -1):  # the highest of the rest rises to its place
            for i in range(passes):
                lower = torch.minimum(columns[i], columns[i + 1])
                columns[i + 1] = torch.maximum(columns[i], columns[i + 1])
                columns[i] = lower
        low, high = columns[num_pruned - 1], columns[num_pruned]
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return _between(low, high).unsqueeze(1)


def _around(values: np.ndarray, num_pruned: int, near: float) -> tuple[np.ndarray, int]:
    """The values around the cut, and how many of them are pruned: two passes over memory instead of a selection."""
    for reach in (0.03, 0.3):
        above = values > near * (1 - reach)
        below = values.size - int(np.count_nonzero(above))
        if below >= num_pruned:
            continue
        above &= values < near * (1 + reach)
        inside = np.flatnonzero(above)
        if below + len(inside) > num_pruned:
            return values[0, inside][None], num_pruned - below
    return values, num_pruned
