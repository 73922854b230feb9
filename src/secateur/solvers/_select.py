"""Prune by score and leave the survivors as they are."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.calibration import Need
from secateur.patterns import with_scope
from secateur.solvers._importance import Importance
from secateur.solvers._problem import LayerProblem, Solution, Solver


@dataclass(frozen=True)
class Select(Solver):
    """Keep the weights that an importance scores highest, unchanged. Cost: one pass over the weight and a selection.

    Args:
        importance: for example ``Magnitude()`` or ``Wanda()``; its scope is used for an ``Unstructured()`` pattern.

    Example:
        >>> import torch, secateur
        >>> problem = secateur.LayerProblem(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), None, secateur.NM(2, 4))
        >>> secateur.Select(secateur.Magnitude()).solve(problem).weight.tolist()
        [[3.0, 0.0, 2.0, 0.0]]
    """

    importance: Importance

    @property
    def needs(self) -> frozenset[Need]:
        return self.importance.needs

    def solve(self, problem: LayerProblem) -> Solution:
        scores = self.importance.scores(problem.weight, problem.statistics)
        pattern = with_scope(problem.pattern, self.importance.scope)
        mask = pattern.mask(problem.ranked(scores), problem.sparsity)
        return Solution(problem.weight.masked_fill(~mask, 0), mask, scores, pattern)
