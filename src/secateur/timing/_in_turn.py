"""Alternatives are timed in turn, so that a disturbance affects all of them, and compared by ratios."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import quantiles
from typing import TypeVar

Name = TypeVar("Name")
Timer = Callable[[], float]  # returns seconds since any fixed time

_BUDGET = 0.25  # seconds for one set of alternatives, after the fewest rounds
_PATIENCE = 4  # how many times the budget, while the machine is busy
_NOISY = 1.25  # upper over lower quartile of the times of one call; on a quiet machine the ratio is lower
_FEWEST, _MOST = 7, 31  # rounds
_HOPELESS = {2: 2.0, 3: 1.3}  # a call that takes this many times the fastest one after so many rounds is dropped
_REST = 0.1  # seconds; threads of OpenMP and ONNX Runtime go on turning for some tens of milliseconds after a call
_WARM = 0.1  # seconds, until the threads that were woken have found a core each, and the caches are filled
_MOST_CALLS = 1000  # to warm up
_SHORT = 2e-4  # seconds; a shorter call is repeated within a round, because a timer is not exact enough for it


def time_in_turn(
    calls: Mapping[Name, Callable[[], object]],
    against: Name,
    timer: Timer = time.perf_counter,
    before: Callable[[], object] | None = None,
    keep: Collection[Name] = (),
    alone: bool = False,
    ready: Mapping[Name, Callable[[], object]] | None = None,
    fewest: int = _FEWEST,
) -> dict[Name, list[float]]:
    """Call each in turn, round after round, and return the seconds of each round.

    Args:
        calls: the alternatives by name.
        against: the name of the one that all others are compared with. It is never dropped. Its times show whether the
            machine is busy, so that more rounds are needed.
        timer: returns seconds since any fixed time.
        before: called before each call; its time does not count.
        keep: names of further alternatives that are never dropped. Any other is dropped after two rounds if it takes
            more than twice the time of the fastest, and after three rounds if it takes 1.3 times as long.
        alone: whether each is timed as in a process that runs nothing else: after a rest, in which the threads of the
            one before it go to sleep, and untimed calls for as long. A round then takes a fifth of a second for each.
        ready: what to do before the calls of a name in each round; its time does not count.
        fewest: rounds. Calls that take seconds need fewer than others, because little of that is noise.

    Returns:
        Seconds by name, one number for each round. Alternatives that were dropped have fewer.
    """
    repeats, ready = {}, ready or {}
    for name, call in calls.items():
        if name in ready:
            ready[name]()
        call()  # the first call may do work that later ones do not
        began = timer()
        call()
        taken = timer() - began
        repeats[name] = 1 if before else min(20, max(1, math.ceil(_SHORT / taken))) if taken > 0 else 1
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    running = list(calls)
    began = timer()
    for number in range(_MOST):
        if number >= fewest and timer() - began > _BUDGET * (_PATIENCE if is_noisy(seconds[against]) else 1):
            break
        if number in _HOPELESS:
            limit = _HOPELESS[number] * min(min(times) for times in seconds.values())
            running = [n for n in running if n == against or n in keep or min(seconds[n]) <= limit]
        for name in running:
            if before:
                before()
            if name in ready:
                ready[name]()
            call, times = calls[name], range(repeats[name])
            if alone:
                _settle(call, timer)
            start = timer()
            for _ in times:
                call()
            seconds[name].append((timer() - start) / len(times))
    return seconds


def _settle(call: Callable[[], object], timer: Timer) -> None:
    time.sleep(_REST)
    began = timer()
    for _ in range(_MOST_CALLS):
        call()
        if timer() - began >= _WARM:
            return


def is_noisy(times: Sequence[float]) -> bool:
    """Return whether the times of one call show that the machine was busy with something else."""
    low, _, high = quantiles(times, n=4, method="inclusive")
    return high > _NOISY * low


def ratios(times: Mapping[Name, Sequence[float]], against: Name, name: Name) -> tuple[float, float, float]:
    """Return how many times as fast one alternative is as another.

    Args:
        times: seconds by name, from :func:`time_in_turn`.
        against: the name of the other.
        name: the name of the one.

    Returns:
        Lower quartile, median and upper quartile of the ratios within each round. A disturbance in a round affects
        both, so that their ratio is steadier than either time.
    """
    pairs = [other / own for other, own in zip(times[against], times[name], strict=False) if own > 0] or [1.0]
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    low, middle, high = quantiles(pairs, n=4, method="inclusive")
    return low, middle, high
