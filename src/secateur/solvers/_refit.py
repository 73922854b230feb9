"""Keep any solver's mask and re-estimate the surviving weights by least squares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur._checks import integer, number
from secateur.calibration import Need
from secateur.solvers._gram import damped, gram_for
from secateur.solvers._problem import LayerProblem, Solution, Solver


@dataclass(frozen=True)
class Refit(Solver):
    r"""Masked least squares: :math:`\min_V \lVert (W - V) X \rVert^2 + \lambda \lVert W - V \rVert^2` on the mask.

    The mask is the inner solver's. Rows are independent, and all are solved at once by conjugate gradients with the
    diagonal as preconditioner, from the inner solver's weights; every iteration lowers the objective. The ridge pulls
    towards the dense weights, not towards zero.

    Cost: ``iterations + 1`` products of ``[out, in]`` with ``[in, in]``, no factorisation.

    Differs from the paper: step lengths are computed for each row, as in its code, where the text has one for all.

    Args:
        inner: the solver whose mask is kept, for example ``Select(Wanda())``.
        iterations: of conjugate gradients; 10 come within about a percent of the exact solution.
        damping: lambda as a fraction of the mean of the Gram matrix's diagonal.

    Raises:
        RecipeError: iterations below 1 or damping below 0.

    Example:
        >>> import torch, secateur
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 0.1]])
        >>> gram = x.T @ x
        >>> statistics = secateur.LayerStatistics(tokens=2, input_norm=gram.diagonal().sqrt(), gram=gram)
        >>> problem = secateur.LayerProblem(torch.tensor([[1.0, 1.5]]), statistics, secateur.NM(1, 2))
        >>> solver = secateur.Refit(secateur.Select(secateur.Wanda()), damping=0.0)
        >>> [round(weight, 2) for weight in solver.solve(problem).weight[0].tolist()]
        [0.0, 2.49]

    Reference:
        Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024,
        arXiv:2406.07831, algorithm 2.
    """

    inner: Solver
    iterations: int = 10
    damping: float = 0.01

    def __post_init__(self) -> None:
        integer("iterations", self.iterations, 1)
        number("damping", self.damping, 0)

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs | {"gram"}

    @torch.no_grad()
    def solve(self, problem: LayerProblem) -> Solution:
        start = self.inner.solve(problem)
        gram = damped(gram_for(problem.weight, problem.statistics), self.damping)
        rows, columns = problem.weight.shape
        shape = (len(gram), rows // len(gram), columns)
        kept = start.mask.view(shape)
        preconditioner = gram.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(1)

        solved = start.weight.reshape(shape).clone()
        residual = ((problem.weight.reshape(shape) - solved) @ gram) * kept
        direction = preconditioner * residual
        energy = (residual * direction).sum(2, keepdim=True)
        # A solved row's residual is the noise of rounding, which further steps would amplify: it stands still.
        solved_at = energy * torch.finfo(energy.dtype).eps ** 2
        for _ in range(self.iterations):
            product = (direction @ gram) * kept
            step = _ratio(energy, (direction * product).sum(2, keepdim=True)) * (energy > solved_at)
            solved += step * direction
            residual -= step * product
            preconditioned = preconditioner * residual
            previous, energy = energy, (residual * preconditioned).sum(2, keepdim=True)
            direction = preconditioned + _ratio(energy, previous) * direction
        solved = solved.view_as(problem.weight)
        # What did not move keeps its bits, -0.0 among them.
        return replace(start, weight=torch.where(solved == start.weight, start.weight, solved))


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Zero instead of 0 / 0, for rows that are solved already."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
