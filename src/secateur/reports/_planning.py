"""What could be made of a model for a target, what was made, and how it turned out, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.reports._plan_records import PlannedPart, PlanPoint


@dataclass(frozen=True)
class PlanReport:
    """What :func:`secateur.plan` or :func:`secateur.optimize_` found.

    Args:
        model: name of the directory or class.
        target: as it was given, such as ``"4x"``; empty if only the loss was limited.
        max_loss: as it was given, such as ``"1%"``; empty if the loss was left free.
        metric: the figure that says how good a model is, such as ``"rank"``.
        higher_is_better: of that figure.
        shapes: of the inputs at which time counts.
        dense: the dense model in PyTorch, with its figure.
        alternatives: the dense model in other engines, and in 8 bits, as measured.
        frontier: the least predicted loss for each speed, from slow to fast.
        candidates: models that were made and measured on the way.
        predicted: the chosen one, as the last solution predicted it; None if the target cannot be reached.
        measured: the same as measured at the end; None if nothing was made.
        parts: what happens to each part of the chosen one.
        rounds: for each round in which measured times corrected the costs: predicted and measured milliseconds by
            shape.
        stages: of the recipe, with their settings.
        phases: seconds by what they were spent on.
        reached: whether the target was reached, as measured if something was made, else as predicted.
        threads: that computed.
        machine: that times were measured on.
        notes: what else is worth knowing, such as that another way is as good.
        versions: of secateur, torch, Python and the engines.
    """

    model: str
    target: str
    max_loss: str
    metric: str
    higher_is_better: bool
    shapes: tuple[tuple[int, ...], ...]
    dense: PlanPoint
    alternatives: tuple[PlanPoint, ...] = ()
    frontier: tuple[PlanPoint, ...] = ()
    candidates: tuple[PlanPoint, ...] = ()
    predicted: PlanPoint | None = None
    measured: PlanPoint | None = None
    parts: tuple[PlannedPart, ...] = ()
    rounds: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    reached: bool = False
    threads: int = 1
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
