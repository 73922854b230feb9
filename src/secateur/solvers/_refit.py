"""Keep any solver's mask and re-estimate the surviving weights by least squares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur._checks import integer, number
from secateur._errors import RecipeError
from secateur._types import Weight
from secateur.calibration import Need
from secateur.solvers._gram import damped, gram_for, upper_factor
from secateur.solvers._least_squares import fit
from secateur.solvers._problem import LayerProblem, Solution, Solver
from secateur.solvers._round import check_rounding, descend, round_columns, without_none

_SWEEPS = 4  # on the grid; later ones hardly change the error


@dataclass(frozen=True)
class Refit(Solver):
    r"""Masked least squares: :math:`\min_V \lVert (W - V) X \rVert^2 + \lambda \lVert W - V \rVert^2` on the mask.

    The mask is the inner solver's. All rows are solved at once by conjugate gradients, from the inner solver's weights;
    every iteration lowers the objective. They end where the gains, which shrink from one to the next, promise less than
    half a percent of the objective in all. The ridge pulls towards the dense weights, not towards zero.

    With ``rounding``, the result is rounded column by column, the later ones making up for each error, and then each
    weight in turn moves to the place on the grid that is best while the others stay, until nothing moves or all columns
    were visited four times. The grid is what packing with that ``value_dtype`` stores.

    Cost: for each iteration, a product of ``[out, in]`` with ``[in, in]``, and two more of them in all; mostly there
    are 3 to 8 iterations. Small layers, high sparsities and masks that many rows share are factorised instead, which is
    exact. With rounding, one factorisation and up to five more products.

    Differs from the paper: step lengths are computed for each row, as in its code, where the text has one for all. What
    preconditions is not the diagonal alone, but also the root of ``in`` strongest directions of the inputs, inverted
    for each row's own mask. Where inputs are correlated, ten iterations with the diagonal are up to a fifth off.

    Args:
        inner: the solver whose mask is kept, for example ``Select(Wanda())``.
        iterations: of conjugate gradients, at most; 10 come within about half a percent of the exact objective.
        damping: lambda as a fraction of the mean of the Gram matrix's diagonal.
        rounding: ``"int8"`` or ``"int4"`` to round what is kept; None not to.

    Raises:
        RecipeError: iterations below 1, damping below 0, an unknown rounding, or an inner solver that rounds where
            this one does not.

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
    rounding: str | None = None

    __repr__ = without_none

    def __post_init__(self) -> None:
        integer("iterations", self.iterations, 1)
        number("damping", self.damping, 0)
        check_rounding(self.rounding)
        inner = getattr(self.inner, "rounding", None)
        if inner is not None and self.rounding is None:
            raise RecipeError(
                f"the method inside the refit rounds to {inner}, and the refit would move its weights off that grid.\n"
                f"Give rounding={inner!r} to Refit instead."
            )

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs | {"gram"}

    @torch.no_grad()
    def solve(self, problem: LayerProblem) -> Solution:
        start = self.inner.solve(problem)
        gram = damped(gram_for(problem.weight, problem.statistics), self.damping)
        height = (start.pattern or problem.pattern).units(problem.weight.shape).height
        solved = fit(problem.weight, start.weight, start.mask, gram, self.iterations, height)
        return replace(start, weight=solved) if self.rounding is None else self._round(problem, start, solved)

    def _round(self, problem: LayerProblem, start: Solution, solved: Weight) -> Solution:
        assert problem.statistics is not None
        assert self.rounding is not None
        factor, damping = upper_factor(solved, problem.statistics, self.damping)
        gram = damped(gram_for(solved, problem.statistics), damping)
        rounded = round_columns(solved, factor, self.rounding)
        rounded = descend(rounded, problem.weight, solved, gram, self.rounding, _SWEEPS)
        raised = f"damping raised from {self.damping:g} to {damping:g}"
        return replace(start, weight=rounded, notes=start.notes if damping == self.damping else (*start.notes, raised))
