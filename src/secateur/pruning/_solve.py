"""Choose one option for each layer, at the least loss, under budgets: exact.

One or two budgets by dynamic programming over whole numbers, more by an integer program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from secateur._errors import RecipeError

Within: TypeAlias = Literal["at most", "nearest"]

_INFEASIBLE = 2  # the status of scipy
_MOST_STATES = 1 << 22  # totals that are told apart; there is one byte or two for each of them and each layer


@dataclass(frozen=True)
class Option:
    """What may be done to a layer.

    Args:
        costs: whole numbers, at least 0, one for each budget: such as weights, bytes or microseconds.
        loss: what it does to the model; the losses of all layers add up. Infinite: never chosen.
    """

    costs: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Chosen:
    """The best choice.

    Args:
        picked: of each layer, the index of its option.
        costs: of all layers together and what is fixed, for each budget.
        loss: of all layers together.
    """

    picked: tuple[int, ...]
    costs: tuple[int, ...]
    loss: float


def choose(
    layers: Sequence[Sequence[Option]],
    budgets: Sequence[int],
    fixed: Sequence[int] | None = None,
    within: Within = "at most",
) -> Chosen:
    r"""Return the choice of one option for each layer that has the least loss under the budgets.

    .. math:: \min_o \sum_l loss_{l, o_l} \quad \text{with} \quad fixed_b + \sum_l cost_{l, o_l, b} \le budget_b

    Every total of costs is told apart, so that the result is exact: it is what trying all choices would give. Of
    choices with equal loss, one with the lower costs is returned. Time: layers x options x the product of the budgets,
    each divided by the greatest common divisor of its costs; memory: a byte or two for each layer and total.

    Args:
        layers: the options of each layer; all with one cost for each budget.
        budgets: one or two.
        fixed: what is spent whatever is chosen, for each budget; None for nothing. It is taken off the budget once, and
            the budgets given are never changed.
        within: ``"at most"`` for totals up to the budgets; ``"nearest"``, for one budget, for those totals that lie
            nearest to it, above or below.

    Raises:
        RecipeError: no choice is within the budgets, the message says what is possible; or there are too many totals
            to be told apart.

    Example:
        >>> from secateur.pruning import Option, choose
        >>> layers = [[Option((4,), 0.0), Option((2,), 0.3)], [Option((4,), 0.0), Option((2,), 0.1)]]
        >>> choose(layers, [6])
        Chosen(picked=(0, 1), costs=(6,), loss=0.1)
    """
    fixed = tuple(fixed or (0,) * len(budgets))
    left = [budget - spent for budget, spent in zip(budgets, fixed, strict=True)]
    units = [_unit(layers, axis) for axis in range(len(budgets))]
    least = [sum(min(option.costs[axis] for option in options) for options in layers) for axis in range(len(budgets))]
    most = [sum(max(option.costs[axis] for option in options) for options in layers) for axis in range(len(budgets))]
    for axis, (room, low) in enumerate(zip(left, least, strict=True)):
        if within == "at most" and low > room:
            raise RecipeError(
                f"the budget is {budgets[axis]:,}, but the cheapest choice costs {low + fixed[axis]:,}.\n"
                "Raise the budget, or give the layers cheaper options."
            )
    # What no choice reaches is not told apart. Two budgets each have a cheapest choice, but perhaps not the same one.
    limits = most if within == "nearest" else [min(room, high) for room, high in zip(left, most, strict=True)]
    shape = tuple(limit // unit + 1 for limit, unit in zip(limits, units, strict=True))
    if (states := math.prod(shape)) > _MOST_STATES:
        raise RecipeError(
            f"{states:,} totals of costs would have to be told apart, and {_MOST_STATES:,} are possible.\n"
            "Give the costs in coarser units."
        )
    best = np.full(shape, np.inf)
    best[(0,) * len(shape)] = 0.0
    steps = []
    for options in layers:
        best, step = _added(best, options, units)
        steps.append(step)
    reached = np.isfinite(best)
    if not reached.any():
        raise RecipeError(
            f"no choice is within the budgets {', '.join(f'{budget:,}' for budget in budgets)} at once, and the "
            f"cheapest of each alone costs {', '.join(f'{low + f:,}' for low, f in zip(least, fixed, strict=True))}.\n"
            "Raise a budget, or give the layers cheaper options."
        )
    if within == "nearest":
        distance = np.abs(np.arange(shape[0]) * units[0] - left[0])
        reached &= distance == distance[reached].min()
    end = int(np.where(reached, best, np.inf).argmin())
    state = tuple(int(index) for index in np.unravel_index(end, shape))
    loss = float(best[state])
    costs = tuple(index * unit + spent for index, unit, spent in zip(state, units, fixed, strict=True))
    picked = []
    for options, step in zip(reversed(layers), reversed(steps), strict=True):
        number = int(step[state])
        picked.append(number)
        spent = options[number].costs
        state = tuple(index - cost // unit for index, cost, unit in zip(state, spent, units, strict=True))
    return Chosen(tuple(reversed(picked)), costs, loss)


def _unit(layers: Sequence[Sequence[Option]], axis: int) -> int:
    """The greatest number that divides all costs."""
    return math.gcd(*(option.costs[axis] for options in layers for option in options)) or 1


def _added(best: np.ndarray, options: Sequence[Option], units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The least loss of each total with one layer more, and which of its options gives it."""
    after = np.full_like(best, np.inf)
    step = np.zeros(best.shape, np.uint8 if len(options) <= 256 else np.uint16)
    for number, option in enumerate(options):
        moved = [cost // unit for cost, unit in zip(option.costs, units, strict=True)]
        if any(move >= size for move, size in zip(moved, best.shape, strict=True)):
            continue
        to = tuple(slice(move, None) for move in moved)
        since = tuple(slice(0, size - move) for move, size in zip(moved, best.shape, strict=True))
        loss = best[since] + option.loss
        better = loss < after[to]
        np.copyto(after[to], loss, where=better)
        step[to][better] = number
    return after, step


def choose_many(
    layers: Sequence[Sequence[tuple[Sequence[float], float]]], budgets: Sequence[float]
) -> tuple[int, ...] | None:
    r"""Return the number of one option for each layer, of the choice with the least loss under any number of budgets.

    As :func:`choose`, for costs that are no whole numbers, or more than two budgets: an integer program, which HiGHS
    solves to the end.

    Args:
        layers: the options of each layer: what each costs of each budget, and what it loses.
        budgets: what all layers together may cost.

    Returns:
        None if no choice is within all budgets.

    Raises:
        ImportError: scipy is missing.
        RecipeError: the solver gave up.

    Example:
        >>> from secateur.pruning import choose_many
        >>> large, small = (4.0, 1.0, 1.0), (2.0, 1.0, 1.0)
        >>> layers = [[(large, 0.0), (small, 0.3)], [(large, 0.0), (small, 0.1)]]
        >>> choose_many(layers, (6.0, 2.0, 2.0)), choose_many(layers, (3.0, 2.0, 2.0))
        ((0, 1), None)
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError(
            "more than two budgets, such as times at three shapes, are solved by scipy, which is missing: pip install "
            "'secateur[plan]'"
        ) from error
    flat = [option for options in layers for option in options]
    owner = np.repeat(np.arange(len(layers)), [len(options) for options in layers])
    one_each = (owner == np.arange(len(layers))[:, None]).astype(float)
    spent = np.array([costs for costs, _ in flat], dtype=float).T
    scale = np.maximum(np.abs(spent).max(axis=1), 1e-12)
    found = milp(
        np.array([loss for _, loss in flat]),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent / scale[:, None], -np.inf, np.asarray(budgets, dtype=float) / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.status == _INFEASIBLE:
        return None
    if found.x is None or found.status != 0:
        raise RecipeError(f"the integer program for {len(layers)} parts was not solved: {found.message}")
    taken = np.round(found.x).astype(bool)
    starts = np.cumsum([0, *(len(options) for options in layers)])
    return tuple(int(np.flatnonzero(taken[start:end])[0]) for start, end in pairwise(starts))
