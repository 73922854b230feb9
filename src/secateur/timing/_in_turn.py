"""Alternatives timed in turn, so that what disturbs one disturbs all, and their ratios."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import quantiles
from typing import TypeVar

Name = TypeVar("Name")
Timer = Callable[[], float]  # seconds from any origin

_BUDGET = 0.25  # seconds for one set of alternatives, beyond the fewest rounds
_PATIENCE = 4  # times the budget, while the machine is busy with something else
_NOISY = 1.25  # upper over lower quartile of the same call's times; a quiet machine stays below
_FEWEST, _MOST = 7, 31  # rounds
_HOPELESS = 2.0  # times slower than the fastest after two rounds: no longer called
_SHORT = 2e-4  # seconds; shorter calls are repeated within a round


def time_in_turn(
    calls: Mapping[Name, Callable[[], object]],
    against: Name,
    timer: Timer = time.perf_counter,
    before: Callable[[], object] | None = None,
    keep: Collection[Name] = (),
) -> dict[Name, list[float]]:
    """Call each in turn, round after round, and return the seconds of each round.

    Args:
        calls: by name.
        against: the name of the one that all others are compared with. It is called to the end, and its own times say
            whether the machine is busy, and more rounds are needed.
        timer: seconds from any origin.
        before: run before each call, outside of its time.
        keep: others that are called to the end. The rest are dropped after two rounds if they are hopelessly slow.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # makes ready what is made at the first call
        began = timer()
        call()
        taken = timer() - began
        repeats[name] = 1 if before else min(20, max(1, math.ceil(_SHORT / taken))) if taken > 0 else 1
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    running = list(calls)
    began = timer()
    for number in range(_MOST):
        if number >= _FEWEST and timer() - began > _BUDGET * (_PATIENCE if is_noisy(seconds[against]) else 1):
            break
        if number == 2:
            limit = _HOPELESS * min(min(times) for times in seconds.values())
            running = [n for n in running if n == against or n in keep or min(seconds[n]) <= limit]
        for name in running:
            if before:
                before()
            call, times = calls[name], range(repeats[name])
            start = timer()
            for _ in times:
                call()
            seconds[name].append((timer() - start) / len(times))
    return seconds


def is_noisy(times: Sequence[float]) -> bool:
    """Return whether times of the same call say that the machine was busy with something else."""
    low, _, high = quantiles(times, n=4, method="inclusive")
    return high > _NOISY * low


def ratios(times: Mapping[Name, Sequence[float]], against: Name, name: Name) -> tuple[float, float, float]:
    """Return how many times as fast one is as another: lower quartile, median and upper quartile of common rounds."""
    pairs = [other / own for other, own in zip(times[against], times[name], strict=False) if own > 0] or [1.0]
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    low, middle, high = quantiles(pairs, n=4, method="inclusive")
    return low, middle, high
