"""How much of a budget is used: in optimizer steps, or in working time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Clock:
    """Working time: the time between a stop and the resume does not count.

    Args:
        now: returns seconds since any fixed time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._began, self._before = now, now(), 0.0

    def go_on_from(self, seconds: float) -> None:
        """Count on from the working time of a run that was stopped."""
        self._before = max(self._before, seconds)
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """Working time so far."""
        return self._before + self._now() - self._began


class Budget(Protocol):
    """A budget of a training."""

    def used(self, step: int) -> float:
        """Return the part that is used after some steps, from 0 on; 1 or more when it is at its end."""


@dataclass(frozen=True)
class Steps:
    """A number of optimizer steps.

    Args:
        total: of them.
    """

    total: int

    def used(self, step: int) -> float:
        """Return the part of the steps that is done."""
        return step / self.total


@dataclass(frozen=True)
class WorkingTime:
    """A part of the working time.

    Args:
        clock: of the run.
        begin: seconds at which training begins.
        end: seconds at which it ends.
    """

    clock: Clock
    begin: float
    end: float

    def used(self, step: int) -> float:
        """Return the part of the time that is over."""
        return (self.clock.seconds - self.begin) / max(self.end - self.begin, 1e-9)


WARM_UP = 0.05  # of the budget


def rate_at(used: float) -> float:
    """Return the part of the highest learning rate after some part of the budget: a linear rise, then down to zero."""
    if used < WARM_UP:
        return used / WARM_UP
    return max(0.0, (1 - used) / (1 - WARM_UP))
