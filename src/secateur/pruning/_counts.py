"""From shares to whole units: exactly as many weights as the budget, in every layer as near to its share as they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from secateur.patterns import SparsityPattern, units_to_prune

Shares = NDArray[np.float64]  # one sparsity for each layer
Family = Callable[[float], Shares]  # shares that grow with a number


@dataclass(frozen=True)
class Steps:
    """What a pattern can prune of a layer, in steps of one unit more in every competition.

    Args:
        weights: of a step.
        low: the fewest steps.
        high: the most.
        number: how many there are without bounds.
    """

    weights: int
    low: int
    high: int
    number: int

    @classmethod
    def of(cls, pattern: SparsityPattern, shape: Sequence[int], bounds: tuple[float, float] = (0.0, 1.0)) -> Steps:
        """Return the steps of a pattern in a matrix, between two sparsities, rounded as every sparsity is."""
        units = pattern.units(shape)
        low, high = (units_to_prune(units.count, bound) for bound in bounds)
        return cls(units.competitions * units.size, low, high, units.count)

    @property
    def total(self) -> int:
        """Weights that are pruned at sparsity 1: all but a dense remainder."""
        return self.weights * self.number


def meet(family: Family, sizes: Sequence[int], budget: float, bounds: tuple[float, float]) -> Shares:
    """Return that member of a family of shares that prunes a budget.

    Args:
        family: from a number, -60 to 60, to the share of each layer. No share falls when the number grows. What is
            beyond the bounds is cut off.
        sizes: weights of each layer.
        budget: weights to prune; within what the bounds allow.
        bounds: of every share.

    Returns:
        Shares between the bounds whose total is the budget. Where the family jumps over it, a mean of both sides.
    """
    weights = np.asarray(sizes, np.float64)

    def at(number: float) -> Shares:
        return np.clip(family(number), *bounds)

    low, high = np.full(len(weights), bounds[0]), np.full(len(weights), bounds[1])
    below, above = -_END, _END
    if float(at(below) @ weights) >= budget:
        high = at(below)
    elif float(at(above) @ weights) <= budget:
        low = at(above)
    else:
        for _ in range(_HALVINGS):
            middle = (below + above) / 2
            if float(at(middle) @ weights) < budget:
                below = middle
            else:
                above = middle
        low, high = at(below), at(above)
    less, more = float(low @ weights), float(high @ weights)
    part = min(max((budget - less) / (more - less), 0.0), 1.0) if more > less else 0.0
    result: Shares = low + part * (high - low)
    return result


_END = 60.0
_HALVINGS = 80  # of 120, down to the last bits


def whole_steps(shares: Sequence[float], steps: Sequence[Steps], start: Sequence[int]) -> list[int]:
    """Return how many steps each layer gets: exactly as many weights as at the start, as near to the shares as may be.

    Layers whose steps have different sizes can exchange weights only in multiples of both: those of 768 and 3,072 in
    3,072. Layers with steps of equal size exchange single steps. So the total is exact whatever the sizes are.

    Args:
        shares: sparsity of each layer; in total as much as at the start, up to rounding.
        steps: of each layer.
        start: steps of each layer, between its bounds, whose total of weights is kept.
    """
    wanted = [min(max(share * entry.number, entry.low), entry.high) for share, entry in zip(shares, steps, strict=True)]
    groups: dict[int, list[int]] = {}
    for index, entry in enumerate(steps):
        groups.setdefault(entry.weights, []).append(index)
    totals = _exchanged(
        {size: sum(wanted[index] for index in members) for size, members in groups.items()},
        {size: sum(start[index] for index in members) for size, members in groups.items()},
        {
            size: (sum(steps[i].low for i in members), sum(steps[i].high for i in members))
            for size, members in groups.items()
        },
    )
    result = [0] * len(steps)
    for size, members in groups.items():
        parts = _in_steps([wanted[i] for i in members], [steps[i] for i in members], totals[size])
        for index, part in zip(members, parts, strict=True):
            result[index] = part
    return result


def _exchanged(wanted: dict[int, float], start: dict[int, int], limits: dict[int, tuple[int, int]]) -> dict[int, int]:
    """Steps of each group of layers with equal steps, by their size: moved between groups while that comes nearer."""
    now = dict(start)
    while True:
        lacking = {size: size * (wanted[size] - steps) for size, steps in now.items()}  # weights
        best: tuple[float, int, int, int] | None = None
        for more, less in permutations([size for size in now if size], 2):
            if lacking[more] <= lacking[less]:
                continue
            weights = math.lcm(more, less)
            room = min((limits[more][1] - now[more]) * more, (now[less] - limits[less][0]) * less) // weights
            moved = weights * min(round((lacking[more] - lacking[less]) / (2 * weights)), room)
            gain = moved * (lacking[more] - lacking[less] - moved)  # half of what the sum of squares falls by
            if gain > _LITTLE and (best is None or gain > best[0]):
                best = gain, more, less, moved
        if best is None:
            return now
        _, more, less, moved = best
        now[more] += moved // more
        now[less] -= moved // less


_LITTLE = 1e-6  # an exchange that gains less would only be one of rounding errors


def _in_steps(wanted: Sequence[float], steps: Sequence[Steps], total: int) -> list[int]:
    """Whole steps of layers whose steps have the same size, with the total given: the largest remainders go up."""
    numbers = np.array([entry.number for entry in steps], np.float64)
    low, high = (np.array([getattr(entry, end) for entry in steps], np.float64) for end in ("low", "high"))

    def at(shift: float) -> Shares:
        return np.clip(np.asarray(wanted) + shift * numbers, low, high)

    below, above = -1.0, 1.0
    for _ in range(_HALVINGS if abs(sum(wanted) - total) > _LITTLE else 0):
        middle = (below + above) / 2
        below, above = (middle, above) if at(middle).sum() < total else (below, middle)
    exact = at((below + above) / 2)
    found = np.floor(exact + _LITTLE)
    order = np.argsort(-(exact - found), kind="stable")  # of equal remainders the first layer
    missing = total - int(found.sum())
    while missing:
        up = missing > 0
        for index in order if up else order[::-1]:
            if missing and (found[index] < high[index] if up else found[index] > low[index]):
                found[index] += 1 if up else -1
                missing += -1 if up else 1
    return [int(number) for number in found]
