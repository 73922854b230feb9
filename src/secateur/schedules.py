"""Schedules: how sparse a model should be at a step of its training.

A schedule is a function from the step, counted from 0, to a sparsity. It is a value: it compares, prints and copies,
and holds no counter. Its end points are exact. The training decides at which steps a mask is updated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur._checks import integer
from secateur.patterns import check_sparsity


class Schedule(ABC):
    """A frozen dataclass with a ``final`` sparsity, reached at step ``end``, that is callable with a step."""

    final: float
    end: int

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """One jump: ``initial`` before step ``at``, ``final`` from then on.

    Args:
        final: sparsity from step ``at`` on, in [0, 1].
        at: the first step at the final sparsity.
        initial: sparsity before, in [0, 1].

    Raises:
        PatternError: a sparsity outside [0, 1].
        RecipeError: a negative step.
        TypeError: a sparsity that is not a number, or a step that is not an int.

    Example:
        >>> from secateur.schedules import OneShot
        >>> schedule = OneShot(0.9, at=100)
        >>> schedule(99), schedule(100)
        (0.0, 0.9)
    """

    final: float
    at: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsities(self.final, self.initial)
        integer("at", self.at, 0)

    @property
    def end(self) -> int:  # type: ignore[override]
        """The first step at the final sparsity."""
        return self.at

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        return float(self.initial if step < self.at else self.final)


@dataclass(frozen=True)
class Linear(Schedule):
    """The same amount at each step: exactly ``initial`` up to ``begin``, exactly ``final`` from ``end`` on.

    Args:
        final: sparsity from step ``end`` on, in [0, 1].
        begin: the last step at the initial sparsity.
        end: the first step at the final sparsity.
        initial: sparsity up to ``begin``, in [0, 1].

    Raises:
        PatternError: a sparsity outside [0, 1].
        RecipeError: a negative step, or an end before the beginning.
        TypeError: a sparsity that is not a number, or a step that is not an int.

    Example:
        >>> from secateur.schedules import Linear
        >>> schedule = Linear(0.8, begin=100, end=200)
        >>> schedule(100), schedule(150), schedule(200)
        (0.0, 0.4, 0.8)
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsities(self.final, self.initial)
        integer("begin", self.begin, 0)
        integer("end", self.end, self.begin)

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        return _between(self, _progress(step, self.begin, self.end))


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, when many weights can be spared, then slower: ``1 - (1 - progress)^3`` of the change.

    Args:
        final: sparsity from step ``end`` on, in [0, 1].
        begin: the last step at the initial sparsity.
        end: the first step at the final sparsity.
        initial: sparsity up to ``begin``, in [0, 1].

    Raises:
        PatternError: a sparsity outside [0, 1].
        RecipeError: a negative step, or an end before the beginning.
        TypeError: a sparsity that is not a number, or a step that is not an int.

    Example:
        >>> from secateur.schedules import Cubic
        >>> schedule = Cubic(0.5, begin=100, end=200)
        >>> schedule(100), schedule(150), schedule(200)
        (0.0, 0.4375, 0.5)

    Reference:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
        arXiv:1710.01878.
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsities(self.final, self.initial)
        integer("begin", self.begin, 0)
        integer("end", self.end, self.begin)

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        return _between(self, 1 - (1 - _progress(step, self.begin, self.end)) ** 3)


def _check_sparsities(final: float, initial: float) -> None:
    check_sparsity(final, "final")
    check_sparsity(initial, "initial")


def _progress(step: int, begin: int, end: int) -> float:
    if step >= end:
        return 1.0
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def _between(schedule: Linear | Cubic, part: float) -> float:
    """The sparsity after a part of the steps from begin to end, exact at both."""
    if part == 1.0:
        return float(schedule.final)
    return float(schedule.initial + (schedule.final - schedule.initial) * part)
