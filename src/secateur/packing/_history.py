"""The history of a model: the pattern that each layer was pruned to, from reports of earlier stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from secateur._checks import instance
from secateur.patterns import SparsityPattern, may_come_from, satisfied
from secateur.reports import Report

History: TypeAlias = Report | Sequence[Report]


def patterns_in(history: History) -> Mapping[str, SparsityPattern]:
    """Return the patterns that layers were pruned to, by name. The last report that has a layer counts."""
    reports = [history] if isinstance(history, Report) else list(history)
    return {
        layer.name: SparsityPattern.parse(layer.pattern)
        for report in reports
        for layer in instance("history", report, Report).layers
    }


def patterns_of(weight: Tensor, known: SparsityPattern | None) -> tuple[tuple[SparsityPattern, ...], bool]:
    """Return the patterns to pack a weight ``[out, in]`` with, and whether they were found from its zeros.

    Args:
        weight: the weight to pack.
        known: the pattern in the history, or None. It is used if the weight still has the zeros of this pattern.
    """
    zero = weight == 0
    if known is not None and may_come_from(zero, known):
        return (known,), False
    return satisfied(zero), True
