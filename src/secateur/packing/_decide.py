"""Decide how a layer should run, given what was measured: never slower than dense, within a budget of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from secateur.kernels import Route, RoutePlan
from secateur.packing._measure import DENSE, PREPACKED, Measurement
from secateur.reports import Choice
from secateur.timing import ratios

GAIN = 1.05  # a packed layer must be faster than dense by this somewhere,
LOSS = 0.97  # and nowhere slower than this: the noise of a quiet machine
SLACK = 0.05  # a smaller gain in speed is not worth more memory


@dataclass(frozen=True)
class Decision:
    """How a layer should run.

    Args:
        plan: which route at which batch; None where the layer should stay dense.
        reason: why it should; empty where it should not.
        choices: what the plan gives at each batch, or the best there was within memory where dense stays.
        nbytes: of memory besides the stored weight.
    """

    plan: RoutePlan | None
    reason: str
    choices: tuple[Choice, ...]
    nbytes: int


def decide(measured: Measurement, dense_bytes: int, memory: float) -> Decision:
    """Choose the routes that gain most over all batches among those that fit in memory together and never lose.

    Args:
        measured: from :func:`~secateur.packing.measure`.
        dense_bytes: of the dense weight.
        memory: how many times as many the routes may need together.
    """
    rows = sorted(measured.seconds)
    gains = {
        batch: {route: ratios(times, DENSE, route) for route in times} for batch, times in measured.seconds.items()
    }
    routes = [route for route in measured.nbytes if all(route in gains[batch] for batch in rows)]
    routes = [route for route in routes if measured.nbytes[route] <= memory * dense_bytes]
    plans: list[tuple[float, int, dict[int, Route]]] = []  # score, bytes, route by batch
    for count in range(1, min(len(routes), len(rows)) + 1):
        for combined in combinations(routes, count):
            nbytes = sum(measured.nbytes[route] for route in combined)
            taken = {batch: max(combined, key=lambda route, of=gains[batch]: of[route][1]) for batch in rows}  # type: ignore[misc]
            if nbytes <= memory * dense_bytes and set(taken.values()) == set(combined) != {DENSE}:
                reached = [gains[batch][route][1] for batch, route in taken.items()]
                worst = min(reached)  # any plan that nowhere loses comes before any that does
                score = worst - 1000 if worst < LOSS else sum(map(math.log, reached)) / len(rows)
                plans.append((score, nbytes, taken))
    if not plans:
        return Decision(None, f"no route fits in {memory:g} times the bytes of the dense weight", (), 0)
    top = max(score for score, _, _ in plans)
    near = [plan for plan in plans if plan[0] >= top - SLACK]
    _, nbytes, taken = min(near, key=lambda plan: (plan[1], -plan[0]))
    choices = tuple(
        _choice(batch, route, measured.seconds[batch], gains[batch][route]) for batch, route in taken.items()
    )
    slowest, fastest = (pick(choices, key=lambda choice: choice.ratio) for pick in (min, max))
    reason = ""
    if slowest.ratio < LOSS:
        reason = (
            f"at batch {slowest.rows} the best within {memory:g} times the dense bytes ({slowest.route}) takes "
            f"{1 / slowest.ratio:.2f} of the dense layer's time"
        )
    elif not any(choice.ratio >= GAIN and choice.low > 1 for choice in choices):
        reason = f"nothing is faster than dense beyond noise: at best {fastest.ratio:.2f} ({fastest.route})"
    return Decision(None if reason else RoutePlan.of(list(taken.items())), reason, choices, 0 if reason else nbytes)


def _choice(
    rows: int, route: Route, times: Mapping[Route, Sequence[float]], ratio: tuple[float, float, float]
) -> Choice:
    prepacked = median(times[PREPACKED]) if PREPACKED in times else None
    low, middle, high = ratio
    return Choice(rows, str(route), middle, low, high, median(times[route]), median(times[DENSE]), prepacked)
