"""ALPS: ADMM with a penalty that rises until the mask stands still, then conjugate gradients on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._checks import integer, number
from secateur._types import Mask
from secateur.calibration import Need
from secateur.solvers._admm import ADMM, rise
from secateur.solvers._problem import LayerProblem, Solution, Solver
from secateur.solvers._splitting import Found, Layer, Splitting, best, by_group, rival

_RHO = 0.02  # of the first turn: so low that no weight is bound to the first mask
_SWINGING = 0.3  # of the kept weights: where more of them change in a turn, the mask swings, and rho is far too low
_FASTER, _SLOWER, _EVERY = 1.3, 1.16, 3  # what rho is multiplied by, at each turn or at every third
_STILL = 1e-3  # of the kept weights change, and as much of the energy of all weights is off the mask: the end
_FITS = 6  # iterations of conjugate gradients, which come within a percent of the best weights
_AGAIN = 0.1  # rho of the first turn from a mask that is good already


@dataclass(frozen=True)
class ALPS(Solver):
    r"""Find mask and weights together: weights near a mask, the mask of those weights, ever nearer. It loses least.

    .. math::
        B &= (H + \rho I)^{-1} (H W - V + \rho D) \\
        D &= P(B + V / \rho), \quad V \leftarrow V + \rho (B - D)

    H is the Gram matrix of inputs that are scaled to norm 1, with ``damping`` added to the ones of its diagonal, then
    scaled once more so that the square of a weight is what its loss costs. P keeps the largest weights that the pattern
    allows, at the exact count. :math:`\rho` starts at 0.02. It is multiplied by 1.3 after each turn in which the mask
    swings, and by 1.16 after every third turn as it settles, until it stands still. Conjugate gradients then
    fit the weights on it.

    The result is compared with the mask of :class:`SparseGPT`, fitted as well, on up to 256 rows. Where it does not
    clearly win, as it may not with large blocks, the mask of :class:`ADMM` is tried too, then turns that go on from the
    best of the three, and what has the least error on all rows is returned.

    Differs from the paper: it scales inputs to norm 1 only, so that P ranks weights as Wanda does and not as optimal
    brain surgeon does. Its rho starts at 0.1 and rises faster, which finds worse masks. It gets the matrix for each
    rho from an eigendecomposition of H, which takes longer than ten turns; here each rho takes a Cholesky
    factorisation. Its damping is a fraction of the mean of the diagonal, which outliers raise for all other inputs;
    here it is a fraction of each input's own entry. A failed factorisation raises the damping tenfold, up to 1, and
    says so.

    Cost: mostly 25 to 45 turns, each as much as a product of ``[out, in]`` with ``[in, in]`` and a selection, with a
    Cholesky factorisation, in^3 / 3, for every third; 7 such products for the fit, up to as many for the comparison,
    and SparseGPT. Memory: six ``[in, in]`` and seven ``[out, in]`` matrices.

    Args:
        iterations: turns at most.
        damping: added to the diagonal of the Gram matrix, as a fraction of each input's own entry.

    Raises:
        RecipeError: iterations below 1, or damping below 0.

    Example:
        >>> import torch, secateur
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 0.1]])  # two tokens; the inputs are nearly equal
        >>> statistics = secateur.LayerStatistics(tokens=2, gram=x.T @ x)
        >>> problem = secateur.LayerProblem(torch.tensor([[1.0, 1.5]]), statistics, secateur.NM(1, 2))
        >>> solution = secateur.ALPS(damping=0.0).solve(problem)
        >>> [round(weight, 2) for weight in solution.weight[0].tolist()]  # the 1.5 takes over most of the 1
        [0.0, 2.49]

    Reference:
        Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024,
        arXiv:2406.07831.
    """

    iterations: int = 60
    damping: float = 0.01

    def __post_init__(self) -> None:
        integer("iterations", self.iterations, 1)
        number("damping", self.damping, 0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram"})

    @torch.no_grad()
    def solve(self, problem: LayerProblem) -> Solution:
        return by_group(problem, self._solve)

    def _solve(self, problem: LayerProblem) -> Solution:
        layer = Layer.of(problem, self.damping)
        mask = layer.project(layer.weight, layer.pattern, layer.pattern.resolve(problem.sparsity))
        if mask.all() or not mask.any():  # nothing to choose
            return layer.solution(layer.weight, mask, layer.weight)
        found = self._settle(Splitting(layer, layer.weight, mask, _RHO))

        other = rival(layer, found, _FITS)
        if other is not None:
            near, state = rise(layer, ADMM.gradual, ADMM.rho)
            values = layer.fit(near * state.mask, state.mask, _FITS)
            found = best(layer, [found, other, Found(values, state.mask, state.total)])
            # The dual that keeps these values where they are is the slope of the error.
            dual = ((layer.weight - found.values) @ layer.gram).masked_fill_(found.mask, 0)
            again = Splitting(layer, found.values.add(dual, alpha=1 / _AGAIN), found.mask, _AGAIN)
            found = best(layer, [found, self._settle(again)])
        return layer.solution(found.values, found.mask, found.scores)

    def _settle(self, state: Splitting) -> Found:
        """Take turns until the mask stands still, and fit the weights on it."""
        layer = state.layer
        target = layer.pattern.resolve(layer.problem.sparsity)
        near, rho, age = state.total, state.rho, 0
        factor = _factor(layer, rho)
        for _ in range(self.iterations):
            before = state.mask
            near = state.turn(
                rho,
                lambda right, factor=factor: _solve(factor, right),  # type: ignore[misc]
                lambda total: layer.project(total, layer.pattern, target),
            )
            moved = float((state.mask != before).count_nonzero() / state.mask.count_nonzero())
            if moved <= _STILL and _energy_off(near, state.mask) <= _STILL:
                break
            age += 1
            swings = moved > _SWINGING
            if swings or age == _EVERY:
                rho, age = rho * (_FASTER if swings else _SLOWER), 0
                factor = _factor(layer, rho)
        return Found(layer.fit(near * state.mask, state.mask, _FITS), state.mask, state.total)


def _factor(layer: Layer, rho: float) -> Tensor:
    raised = layer.gram.clone()
    raised.diagonal(dim1=1, dim2=2).add_(rho)
    factor: Tensor = torch.linalg.cholesky(raised)
    return factor


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """``right @ inv(L @ L.T)``; two thirds of the time of ``torch.cholesky_solve``, and of this with ``out=``."""
    half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
    whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return whole


def _energy_off(near: Tensor, mask: Mask) -> float:
    """The share of the energy that lies off the mask."""
    return float(1 - (near * mask).square().sum() / near.square().sum())
