"""What ADMM and ALPS share: the units that they work in, and a turn of a solve and a projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur._types import Mask
from secateur.calibration import LayerStatistics
from secateur.patterns import SparsityPattern, with_scope
from secateur.solvers._gram import gram_for, scaled_gram
from secateur.solvers._problem import LayerProblem, Solution
from secateur.solvers._sparsegpt import SparseGPT

_CLEARLY, _ROWS = 0.8, 256  # of the other's error, on so many rows of each group


@dataclass(frozen=True, eq=False)
class Layer:
    """A problem in units in which the square of a weight is about what its loss costs.

    That cost is ``w^2 / inv(H)_jj`` where the other weights make up for it, as in optimal brain surgeon.

    Args:
        problem: where it comes from.
        pattern: the problem's, its scope filled in.
        weight: ``[groups, rows, in]``, zero where an input is dead: such weights cost nothing and are pruned first.
        gram: H, damped, ``[groups, in, in]``; the mean of its diagonal is one.
        scale: ``[groups, 1, in]``, what the weights were multiplied by; zero where an input is dead.
        damping: what the diagonal of H got.
        notes: that it was raised.
    """

    problem: LayerProblem
    pattern: SparsityPattern
    weight: Tensor
    gram: Tensor
    scale: Tensor
    damping: float
    notes: tuple[str, ...]

    @classmethod
    def of(cls, problem: LayerProblem, damping: float) -> Layer:
        pattern = with_scope(problem.pattern, "layer")
        pattern.validate(problem.weight.shape)
        norm = gram_for(problem.weight, problem.statistics).diagonal(dim1=1, dim2=2).sqrt()
        assert problem.statistics is not None
        gram, used = scaled_gram(problem.weight, problem.statistics, damping)
        # The diagonal was 1 + damping before the gram was scaled.
        scale = (norm * ((1 + used) / gram.diagonal(dim1=1, dim2=2)).sqrt()).unsqueeze(1)
        rows, columns = problem.weight.shape
        weight = problem.weight.reshape(len(gram), rows // len(gram), columns) * scale
        notes = () if used == damping else (f"damping raised from {damping:g} to {used:g}",)
        return cls(problem, pattern, weight, gram, scale, used, notes)

    def project(self, values: Tensor, pattern: SparsityPattern, sparsity: float) -> Mask:
        """The mask of the largest values, ``[groups, rows, in]``; what an earlier round pruned is never kept."""
        mask = pattern.mask(self.problem.ranked(self._flat(values.abs())), sparsity)
        if self.problem.pruned is not None:  # a schedule below their share would keep some of them for a while
            mask &= ~self.problem.pruned
        return mask.view_as(values)

    def error(self, values: Tensor, rows: slice = slice(None)) -> float:
        """The damped error of values for some rows of each group."""
        lost = self.weight[:, rows] - values
        return float(torch.linalg.vecdot(lost, lost @ self.gram).sum(dtype=torch.float64))

    def fit(self, start: Tensor, mask: Mask, iterations: int, rows: slice = slice(None)) -> Tensor:
        """Lower the error of some rows of each group by conjugate gradients on a mask that stays."""
        solved, kept = start[:, rows].clone(), mask[:, rows]
        residual = ((self.weight[:, rows] - solved) @ self.gram).mul_(kept)
        preconditioner = self.gram.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(1)
        direction, product = preconditioner * residual, torch.empty_like(residual)
        energy = torch.linalg.vecdot(residual, direction).unsqueeze(2)
        # A solved row's residual is the noise of rounding, which further steps would amplify: it stands still.
        solved_at = energy * torch.finfo(energy.dtype).eps ** 2
        for _ in range(iterations):
            torch.bmm(direction, self.gram, out=product).mul_(kept)
            step = _ratio(energy, torch.linalg.vecdot(direction, product).unsqueeze(2)) * (energy > solved_at)
            solved.addcmul_(step, direction)
            residual.addcmul_(step, product, value=-1)
            torch.mul(preconditioner, residual, out=product)
            previous, energy = energy, torch.linalg.vecdot(residual, product).unsqueeze(2)
            direction.mul_(_ratio(energy, previous)).add_(product)
        return solved

    def solution(self, values: Tensor, mask: Mask, scores: Tensor) -> Solution:
        """What values in these units stand for."""
        dense = self.problem.weight
        dead = self.scale == 0
        # Rows that lost nothing have nothing to make up for: they keep their bits, as all weights of dead inputs do.
        as_it_was = dead | (mask | dead).all(2, keepdim=True)
        weight = self._flat(torch.where(as_it_was, dense.reshape(values.shape), values / self.scale))
        kept = self._flat(mask)
        return Solution(weight.masked_fill(~kept, 0), kept, self._flat(scores.abs()), self.pattern, self.notes)

    def _flat(self, values: Tensor) -> Tensor:
        """From ``[groups, rows, in]`` to ``[out, in]``."""
        return values.reshape(self.problem.weight.shape)


@dataclass(eq=False)
class Splitting:
    r"""Turns between the best weights near a sparse point, and the sparse point that is nearest to them.

    .. math::
        B &= \arg\min_B \; \tfrac12 \mathrm{tr}\,(W - B) H (W - B)^T + \langle V, B \rangle
             + \tfrac\rho2 \lVert B - D \rVert^2 \\
        D &= P(B + V / \rho), \quad V \leftarrow V + \rho (B - D)

    D is :math:`T = B + V / \rho` where the mask keeps it, and V is :math:`\rho T` where it does not: T, the mask and
    rho are the whole state.

    Args:
        layer: W and H.
        total: T.
        mask: P's.
        rho: of the turn before, or of the first one.
    """

    layer: Layer
    total: Tensor
    mask: Mask
    rho: float

    def __post_init__(self) -> None:
        self.total = self.total.clone()
        self._spare = torch.empty_like(self.total)

    def turn(self, rho: float, solve: Callable[[Tensor], Tensor], project: Callable[[Tensor], Mask]) -> Tensor:
        """Take one, and return B.

        Args:
            rho: how much B is drawn to D.
            solve: ``R (H + rho I)^-1``, given R, which it may overwrite; the result is overwritten in the next turn.
            project: the mask, given T.
        """
        # In place: on large layers new memory would take as long as the solve.
        right = torch.mul(self.total, self.mask, out=self._spare)
        self.total -= right
        right.mul_(rho).add_(self.layer.weight, alpha=-rho).add_(self.total, alpha=-self.rho)
        near = solve(right).add_(self.layer.weight)
        torch.add(near, self.total, alpha=self.rho / rho, out=self.total)
        self.mask, self.rho = project(self.total), rho
        return near


@dataclass(frozen=True, eq=False)
class Found:
    """A result in a layer's units, ``[groups, rows, in]`` each."""

    values: Tensor
    mask: Mask
    scores: Tensor


def best(layer: Layer, found: list[Found]) -> Found:
    """The one with the least error; of equals, the first."""
    return min(found, key=lambda one: layer.error(one.values))


def rival(layer: Layer, found: Found, iterations: int) -> Found | None:
    """SparseGPT's mask, fitted; None where a result is clearly better, by up to 256 rows of each group."""
    other = SparseGPT().solve(layer.problem)
    start, mask = other.weight.view_as(found.mask) * layer.scale, other.mask.view_as(found.mask)
    some = slice(None, None, -(-mask.shape[1] // _ROWS))
    least = layer.error(layer.fit(start, mask, iterations, some), some)
    if layer.error(found.values[:, some], some) <= _CLEARLY * least:
        return None
    return Found(layer.fit(start, mask, iterations), mask, other.scores.view_as(mask))


def by_group(problem: LayerProblem, solve: Callable[[LayerProblem], Solution]) -> Solution:
    """Solve each group of a grouped convolution by itself, where the pattern decides each row by itself."""
    gram = gram_for(problem.weight, problem.statistics)
    pattern = with_scope(problem.pattern, "layer")
    rows = len(problem.weight)
    if len(gram) == 1 or pattern.units(problem.weight.shape).competitions % rows:
        return solve(problem)
    assert problem.statistics is not None
    height = rows // len(gram)
    parts = []
    for group, own in enumerate(gram):
        here = slice(group * height, (group + 1) * height)
        statistics = LayerStatistics(problem.statistics.tokens, gram=own)
        pruned = None if problem.pruned is None else problem.pruned[here]
        parts.append(solve(replace(problem, weight=problem.weight[here], statistics=statistics, pruned=pruned)))
    weight, mask, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "mask", "scores"))
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return Solution(weight, mask, scores, pattern, notes)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero instead of 0 / 0, for rows that are solved already."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
