"""Schedules: how sparse a model should be at a step of its training.

A schedule is a function from the step, counted from 0, to a sparsity. It is a value: it compares, prints and copies,
and holds no counter. Its end points are exact. *When* a mask is updated is up to the trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur._errors import RecipeError


class Schedule(ABC):
    """A frozen dataclass with a ``final`` sparsity, reached at step ``end``, that is callable with a step."""

    final: float
    end: int

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""

    def _check(self, initial: float, **steps: int) -> None:
        for name, value in (("final", self.final), ("initial", initial)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, a sparsity, got {type(value).__name__}")
            if not 0 <= value <= 1:
                raise RecipeError(f"{name} is a sparsity, the fraction of zeros, between 0 and 1; got {value:g}.")
        for name, step in steps.items():
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError(f"{name} must be an int, a step of training, got {type(step).__name__}")
        first, *_, last = *steps.values(), *steps.values()
        if first < 0 or last < first:
            raise RecipeError(f"a schedule must not end before it begins, nor begin before 0; got {first} to {last}.")


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once: ``initial`` before step ``at``, ``final`` from then on.

    Args:
        final: sparsity from step ``at`` on, in [0, 1].
        at: the first step at the final sparsity.
        initial: sparsity before, in [0, 1].

    Raises:
        RecipeError: a sparsity outside [0, 1] or a negative step.
        TypeError: a sparsity that is no number or a step that is no int.

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
        self._check(self.initial, at=self.at)

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
        RecipeError: a sparsity outside [0, 1], a negative step or an end before the beginning.
        TypeError: a sparsity that is no number or a step that is no int.

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
        self._check(self.initial, begin=self.begin, end=self.end)

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        return _travel(self, _progress(step, self.begin, self.end))


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, while there is much that can go, then slower: ``1 - (1 - progress)^3`` of the way.

    Args:
        final: sparsity from step ``end`` on, in [0, 1].
        begin: the last step at the initial sparsity.
        end: the first step at the final sparsity.
        initial: sparsity up to ``begin``, in [0, 1].

    Raises:
        RecipeError: a sparsity outside [0, 1], a negative step or an end before the beginning.
        TypeError: a sparsity that is no number or a step that is no int.

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
        self._check(self.initial, begin=self.begin, end=self.end)

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        return _travel(self, 1 - (1 - _progress(step, self.begin, self.end)) ** 3)


def _progress(step: int, begin: int, end: int) -> float:
    if step >= end:
        return 1.0
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def _travel(schedule: Linear | Cubic, part: float) -> float:
    """The sparsity after a part of the way, with both ends exact."""
    if part == 1.0:
        return float(schedule.final)
    return float(schedule.initial + (schedule.final - schedule.initial) * part)
