"""The contract between a solver and its caller: a problem, a solution, and the check of one against the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._errors import PatternError, SolverError
from secateur._types import Mask, Scores, Weight
from secateur.calibration import LayerStatistics, Need
from secateur.patterns import Scope, SparsityPattern, with_scope


@dataclass(frozen=True)
class LayerProblem:
    """One layer to prune.

    Args:
        weight: ``[out, in]``, float32 or float64; never changed.
        statistics: what calibration gathered, or None for a solver that needs nothing.
        pattern: which masks are legal.
        sparsity: fraction to prune; may be None for a pattern that fixes its own.
        pruned: ``[out, in]`` bool, True = pruned by an earlier round, and to stay so; such a weight is zero. None:
            any weight may be kept. These weights count among those that are to be pruned.
    """

    weight: Weight
    statistics: LayerStatistics | None
    pattern: SparsityPattern
    sparsity: float | None = None
    pruned: Tensor | None = None

    def ranked(self, scores: Scores) -> Scores:
        """Return non-negative scores ``[out, in]``, below all of which are now those of weights that stay pruned.

        A solver that chooses its mask by ``pattern.mask(problem.ranked(scores), ...)`` keeps none of them.
        """
        return scores if self.pruned is None else scores.masked_fill(self.pruned, -1)


@dataclass(frozen=True)
class Solution:
    """A pruned layer.

    Args:
        weight: ``[out, in]``, zero where ``mask`` is False.
        mask: ``[out, in]`` bool, True = kept.
        scores: ``[out, in]``, what the mask was chosen by.
        pattern: the problem's, where the problem left it a choice: ``Unstructured()`` with its scope filled in. None:
            the problem's as it was.
        notes: departures from the plain run worth reporting, such as a raised damping.
    """

    weight: Weight
    mask: Mask
    scores: Scores
    pattern: SparsityPattern | None = None
    notes: tuple[str, ...] = ()


class Solver(ABC):
    """Chooses a mask and the surviving weights of one layer. Pure: the problem is never modified."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """The statistics that ``solve`` reads."""

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Solution:
        """Return a solution that :func:`verify` accepts.

        Raises:
            PatternError: the pattern does not fit the weight or the sparsity.
            StatisticsError: a needed statistic is missing.
            SolverError: the numerics fail beyond the documented remedies.
        """


def verify(problem: LayerProblem, solution: Solution) -> None:
    """Raise unless the solution keeps its contract: a legal mask, the exact count, zeros where pruned, finite weights.

    What an earlier round pruned must be pruned.

    Raises:
        SolverError: naming what is broken.
    """
    if solution.weight.shape != problem.weight.shape or solution.mask.shape != problem.weight.shape:
        raise SolverError(
            f"the solver returned a weight {tuple(solution.weight.shape)} and a mask {tuple(solution.mask.shape)} "
            f"for a weight {tuple(problem.weight.shape)}."
        )
    pattern = solution.pattern or problem.pattern
    scopes: tuple[Scope, ...] = ("layer", "row")
    if pattern != problem.pattern and pattern not in [with_scope(problem.pattern, scope) for scope in scopes]:
        raise SolverError(f"the solver pruned under {pattern!r}, but {problem.pattern!r} was asked.")
    if solution.weight.dtype != problem.weight.dtype or solution.weight.device != problem.weight.device:
        raise SolverError(
            f"the solver returned a weight in {solution.weight.dtype} on {solution.weight.device} "
            f"for one in {problem.weight.dtype} on {problem.weight.device}."
        )
    try:
        pattern.check(solution.mask)
    except (PatternError, TypeError) as error:
        raise SolverError(f"the solver broke the pattern: {error}") from None
    back = 0 if problem.pruned is None else int((solution.mask & problem.pruned).count_nonzero())
    if back:
        raise SolverError(
            f"the solver keeps {back} weights that an earlier round pruned, and these must stay pruned.\n"
            "A solver chooses its mask by pattern.mask(problem.ranked(scores), sparsity)."
        )
    asked = pattern.num_pruned(problem.weight.shape, problem.sparsity)
    pruned = int((~solution.mask).count_nonzero())
    if pruned != asked:
        raise SolverError(f"the solver pruned {pruned} weights, but {asked} were asked.")
    if not torch.isfinite(solution.weight).all():
        raise SolverError(f"{int((~solution.weight.isfinite()).sum())} weights are no longer finite.")
    if bool((solution.weight.masked_fill(solution.mask, 0) != 0).any()):
        raise SolverError("the solver left pruned weights that are not zero.")
