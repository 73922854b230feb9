"""Decide how a layer should run, given its measurement: never slower than dense, and within a limit of memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TypeAlias

from secateur.kernels import Route, RoutePlan
from secateur.packing._measure import DENSE, PREPACKED, Measurement
from secateur.reports import Choice
from secateur.timing import ratios

GAIN = 1.05  # ratio that a packed layer must reach at one batch at least
LOSS = 0.97  # ratio that it must reach at every batch: below 1 because of the noise of a quiet machine
SLACK = 0.05  # a gain in speed that is smaller than this is not worth more memory


@dataclass(frozen=True)
class Decision:
    """How a layer should run.

    Args:
        plan: which route to take at which batch; None if the layer should stay dense.
        reason: why it should stay dense; empty if it should not.
        choices: the times of the plan at each batch. If the layer should stay dense: those of the best plan there was.
        nbytes: bytes of memory that the plan takes besides the stored weight.
    """

    plan: RoutePlan | None
    reason: str
    choices: tuple[Choice, ...]
    nbytes: int


def decide(
    measured: Measurement, dense_bytes: int, memory: float, precisions: Collection[str] = ("exact",)
) -> Decision:
    """Choose the routes that are fastest over all batches.

    Each route of a plan keeps its own layout of the weight. So all routes of the plan must fit into memory together.
    Of plans that are nearly equally fast, the one that takes the least memory is chosen.

    Args:
        measured: from :func:`~secateur.packing.measure`.
        dense_bytes: bytes of the dense weight.
        memory: limit for the bytes of all routes of a plan together, as a multiple of ``dense_bytes``.
        precisions: the arithmetic that routes may have.
    """
    gains = _gains(measured)
    found = _best(measured, gains, dense_bytes, memory, precisions)
    if found is None:
        if not any(route.precision in precisions for route in measured.nbytes if route != DENSE):
            names = " or ".join(precisions)
            return Decision(None, f"no route of {names} arithmetic runs its weight on this machine", (), 0)
        return Decision(None, f"no route fits into {memory:g} times the bytes of the dense weight", (), 0)
    nbytes, taken = found
    choices = tuple(
        _choice(batch, route, measured.seconds[batch], gains[batch][route]) for batch, route in taken.items()
    )
    slowest, fastest = (pick(choices, key=lambda choice: choice.ratio) for pick in (min, max))
    reason = ""
    if slowest.ratio < LOSS:
        reason = (
            f"at batch {slowest.rows} the fastest route within {memory:g} times the dense bytes ({slowest.route}) "
            f"takes {1 / slowest.ratio:.2f} of the dense layer's time"
        )
    elif not any(choice.ratio >= GAIN and choice.low > 1 for choice in choices):
        reason = (
            f"no route is faster than dense by more than noise: the best ratio is {fastest.ratio:.2f} ({fastest.route})"
        )
    return Decision(None if reason else RoutePlan.of(list(taken.items())), reason, choices, 0 if reason else nbytes)


def fastest_plan(
    measured: Measurement, dense_bytes: int, memory: float, precisions: Collection[str] = ("exact",)
) -> RoutePlan | None:
    """Return the plan that :func:`decide` would choose, even if the dense layer is faster; None if no route fits.

    Args:
        measured, dense_bytes, memory, precisions: as for :func:`decide`.
    """
    found = _best(measured, _gains(measured), dense_bytes, memory, precisions)
    return None if found is None else RoutePlan.of(list(found[1].items()))


Gains: TypeAlias = dict[int, dict[Route, tuple[float, float, float]]]  # by rows and route: ratio and its quartiles


def _gains(measured: Measurement) -> Gains:
    return {batch: {route: ratios(times, DENSE, route) for route in times} for batch, times in measured.seconds.items()}


def _best(
    measured: Measurement, gains: Gains, dense_bytes: int, memory: float, precisions: Collection[str]
) -> tuple[int, dict[int, Route]] | None:
    """The bytes of the best plan, and its route for each batch; None if no route fits into memory."""
    rows = sorted(measured.seconds)
    routes = [route for route in measured.nbytes if route.precision in precisions]
    routes = [route for route in routes if all(route in gains[batch] for batch in rows)]
    routes = [route for route in routes if measured.nbytes[route] <= memory * dense_bytes]
    plans: list[tuple[float, int, dict[int, Route]]] = []  # score, bytes, and route by batch
    for count in range(1, min(len(routes), len(rows)) + 1):
        for combined in combinations(routes, count):
            nbytes = sum(measured.nbytes[route] for route in combined)
            taken = {batch: max(combined, key=lambda route, of=gains[batch]: of[route][1]) for batch in rows}  # type: ignore[misc]
            if nbytes <= memory * dense_bytes and set(taken.values()) == set(combined) != {DENSE}:
                reached = [gains[batch][route][1] for batch, route in taken.items()]
                worst = min(reached)  # a plan that is never slower than dense comes before any other
                score = worst - 1000 if worst < LOSS else sum(map(math.log, reached)) / len(rows)
                plans.append((score, nbytes, taken))
    if not plans:
        return None
    top = max(score for score, _, _ in plans)
    near = [plan for plan in plans if plan[0] >= top - SLACK]
    _, nbytes, taken = min(near, key=lambda plan: (plan[1], -plan[0]))
    return nbytes, taken


def _choice(
    rows: int, route: Route, times: Mapping[Route, Sequence[float]], ratio: tuple[float, float, float]
) -> Choice:
    prepacked = median(times[PREPACKED]) if PREPACKED in times else None
    low, middle, high = ratio
    return Choice(rows, str(route), middle, low, high, median(times[route]), median(times[DENSE]), prepacked)
