"""Which units are kept: exact counts, stable ties, and the value that separates the kept from the pruned."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def units_to_prune(units: int, sparsity: float) -> int:
    """Return how many of some units are pruned at a sparsity. No other code turns a fraction into a count."""
    return round(sparsity * units)


def keep_top(scores: Tensor, num_keep: int) -> Tensor:
    """Return True for the ``num_keep`` largest of each row of ``[competitions, units]``; of equal ones, the first."""
    if num_keep == 0 or num_keep == scores.shape[1] or not scores.numel():
        return torch.full(scores.shape, num_keep > 0, dtype=torch.bool, device=scores.device)
    if scores.shape[1] <= _NARROW:
        return _keep_top_narrow(scores, num_keep)
    return _keep_top_wide(scores, num_keep)


# Up to this many units in a competition, all pairs are compared. This reads memory in order and is vectorised over the
# competitions, so that it is faster than a selection in each short row, although it compares more.
_NARROW = 32
_CHUNK = 1 << 20  # elements at a time, so that intermediate results stay in the cache


def _keep_top_narrow(scores: Tensor, num_keep: int) -> Tensor:
    size = scores.shape[1]
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part, out in zip(scores.split(_CHUNK // size), keep.split(_CHUNK // size), strict=True):
        # For each unit: how many others are above it, minus num_keep. A negative number means that it is kept.
        # At first all later units count as above it, and no earlier one. Comparing each pair corrects this.
        excess = [part.new_full((len(part),), size - 1 - i - num_keep, dtype=torch.int8) for i in range(size)]
        for i in range(size):
            for j in range(i + 1, size):
                first_wins = (part[:, i] >= part[:, j]).view(torch.int8)  # >=: of equals the lower index is kept
                excess[i] -= first_wins
                excess[j] += first_wins
        for i in range(size):
            torch.signbit(excess[i], out=out[:, i])  # as `excess < 0`, which PyTorch does not vectorise into a stride
    return keep


def _keep_top_wide(scores: Tensor, num_keep: int) -> Tensor:
    threshold = kth_smallest(scores, scores.shape[1] - num_keep + 1)  # the lowest score that is kept
    keep = scores >= threshold
    counts = keep.count_nonzero().view(1) if len(keep) == 1 else keep.sum(1)  # the same; the first is much faster
    excess = counts - num_keep  # how many units that equal the threshold are too many
    for row in excess.nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        keep[row, ties[len(ties) - int(excess[row]) :]] = False
    return keep


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest number (k from 1) of each row, ``[rows, 1]``."""
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # On a CPU PyTorch's selection takes quadratic time on sorted rows. That of numpy does not, and is vectorised.
    return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())


@torch.no_grad()
def cut_between(scores: Tensor, num_pruned: int, near: float | None = None) -> Tensor:
    """Return the value halfway between the highest pruned and the lowest kept unit of each competition.

    Args:
        scores: ``[competitions, units]``, finite and not negative.
        num_pruned: units to prune in each competition.
        near: a guess of the value, used where there is one competition: such as its value one step before. It saves
            time and never changes the result.

    Returns:
        ``[competitions, 1]``: -inf where nothing is pruned, and inf where everything is.
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
    """The middle of two values, or the higher one where no float lies between them, so that ``>=`` separates them."""
    middle = low + (high - low) / 2
    return torch.where(middle > low, middle, high)


def _cut_narrow(scores: Tensor, num_pruned: int) -> Tensor:
    columns = list(scores.unbind(1))
    units = len(columns)
    if (units, num_pruned) == (4, 2):
        # Of two pairs: the larger of the two smaller ones, and the smaller of the two larger ones, are in the middle.
        a, b, c, d = columns
        low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    else:
        # Bubble sort on whole columns, of the highest values only: it reads memory in order, as for masks above.
        for passes in range(units - 1, num_pruned - 2, -1):  # the highest of the rest moves to the end
            for i in range(passes):
                lower = torch.minimum(columns[i], columns[i + 1])
                columns[i + 1] = torch.maximum(columns[i], columns[i + 1])
                columns[i] = lower
        low, high = columns[num_pruned - 1], columns[num_pruned]
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return _between(low, high).unsqueeze(1)


def _around(values: np.ndarray, num_pruned: int, near: float) -> tuple[np.ndarray, int]:
    """The values around a guess of the cut, and how many of them are pruned. All values, where the guess is wrong.

    Two passes over memory take less time than a selection among all values.
    """
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
