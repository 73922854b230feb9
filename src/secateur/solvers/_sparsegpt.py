"""SparseGPT: prune column by column and let the columns still to come make up for the error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur._checks import integer, number
from secateur.calibration import Need
from secateur.patterns import SparsityPattern, Units, units_to_prune, with_scope
from secateur.solvers._gram import damped, gram_for, upper_factor
from secateur.solvers._problem import LayerProblem, Solution, Solver
from secateur.solvers._removed import whole_columns
from secateur.solvers._round import check_rounding, round_columns, without_none
from secateur.solvers._sweep import PANEL, compensate, open_block, to_columns, to_rows


@dataclass(frozen=True)
class SparseGPT(Solver):
    r"""Optimal brain surgeon swept over the columns, all rows at once.

    Minimises :math:`\lVert (W - V) X \rVert^2` greedily. With :math:`H = X X^T + \lambda I` and
    :math:`H^{-1} = U^T U`, weight :math:`w_{ij}` (as updated so far) costs :math:`(w_{ij} / U_{jj})^2`; the cheapest
    of each block of columns are pruned under the pattern, and every later column moves by
    :math:`-(w_{ij} / U_{jj}) U_{j,\cdot}` to compensate. Blocks are ``block_size`` columns, rounded up to whole units
    of the pattern; N:M decides each group as the sweep reaches it, and ``Row`` decides once, on all columns. Each
    block takes its share of the count, so that the total is exact. Where an earlier round pruned weights, a block
    takes its share of what is to be pruned beside them.

    The sweep is the paper's, the arithmetic is not: with R upper triangular and :math:`H = R R^T`, :math:`U = R^{-1}`,
    and a block's compensation for all columns before it follows from one product with R. That saves the inverse, one of
    two factorisations and every write to columns still to come.

    A unit of several weights costs what its removal costs once the columns to come have made up for it, :math:`\lVert
    W_P (U_{PP})^{-1} \rVert^2`, not the sum of what its weights cost alone; that is :math:`w_i H w_i^T` for a row.
    How many tiles a block of columns loses is decided on the dense weights, by the geometric mean of that cost and of
    the cost when nothing makes up for it. Columns that go whole, in all rows, go one after the other: each time the
    one that costs least when all others take over from it, as in :func:`secateur.solvers.remove_columns`, and what
    stays is the exact fit.

    With ``rounding``, the weights that are kept are then rounded in a second sweep, in which the later columns make up
    for each error of rounding as well. The grid of each row, or of each group of columns in it, is that of the pruned
    weights, and it is what packing with that ``value_dtype`` stores: nothing is lost there. At sparsity 0 this is GPTQ.

    Differs from the paper: inputs that are never active are pruned first, but their weights are untouched at sparsity
    0, where the public code zeroes them; units of several weights are as said above, the paper has none; a failed
    factorisation raises the damping tenfold, up to 1, and says so. The paper prunes and rounds in one sweep; with two,
    the scales are chosen from the weights as pruning left them.

    Cost: one Cholesky factorisation (in^3 / 3) and out * in^2 multiplications, twice as many with rounding; memory:
    three ``[in, in]`` and five ``[out, in]`` matrices.

    Args:
        block_size: columns whose mask is decided together, the paper's B_s.
        damping: added to the diagonal of H, as a fraction of its mean.
        rounding: ``"int8"`` or ``"int4"`` to round what is kept; None not to.

    Raises:
        RecipeError: block_size below 1, damping below 0, or an unknown rounding.

    Example:
        >>> import torch, secateur
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 0.1]])  # two tokens; the inputs are nearly equal
        >>> statistics = secateur.LayerStatistics(tokens=2, gram=x.T @ x)
        >>> problem = secateur.LayerProblem(torch.tensor([[1.0, 1.5]]), statistics, secateur.NM(1, 2))
        >>> solution = secateur.SparseGPT(damping=0.0).solve(problem)
        >>> [round(weight, 2) for weight in solution.weight[0].tolist()]  # the 1.5 takes over most of the 1
        [0.0, 2.49]

    Reference:
        Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023,
        arXiv:2301.00774; section 3.5 for rounding. Frantar et al., "GPTQ: Accurate Post-Training Quantization for
        Generative Pre-trained Transformers", 2022, arXiv:2210.17323.
    """

    block_size: int = 128
    damping: float = 0.01
    rounding: str | None = None

    __repr__ = without_none

    def __post_init__(self) -> None:
        integer("block_size", self.block_size, 1)
        number("damping", self.damping, 0)
        check_rounding(self.rounding)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram"})

    @torch.no_grad()
    def solve(self, problem: LayerProblem) -> Solution:
        weight, pattern = problem.weight, with_scope(problem.pattern, "layer")
        pattern.validate(weight.shape)
        target = pattern.resolve(problem.sparsity)
        gram = gram_for(weight, problem.statistics)
        assert problem.statistics is not None
        groups, rows = len(gram), len(weight)
        factor, damping = upper_factor(weight, problem.statistics, self.damping)
        notes = () if damping == self.damping else (f"damping raised from {self.damping:g} to {damping:g}",)
        units = pattern.units(weight.shape)
        if units.size > 1 and units.height == rows:
            solved, mask, scores = whole_columns(replace(problem, pattern=pattern), gram, damping)
            if self.rounding is not None:
                solved = round_columns(solved, factor, self.rounding)
            return Solution(solved, mask, scores, pattern, notes)
        alive = gram.diagonal(dim1=1, dim2=2) != 0  # [groups, in]

        dense = to_columns(weight, groups)
        pruned = torch.empty_like(dense)
        removed = torch.empty_like(dense)  # dense - pruned, of the columns done
        seen = torch.empty_like(dense)
        kept = torch.empty_like(dense, dtype=torch.bool)

        first = None
        if units.size > 1 and units.competitions == 1 and units.total and pattern.width is not None:
            scores = _costs_at_first(dense, factor, damped(gram, damping), alive, units)
            first = pattern.mask(problem.ranked(scores), target)
        for start, stop, sparsity in _blocks(pattern, problem, target, self.block_size, first):
            inverse, current = open_block(dense, removed, factor, start, stop)
            error = torch.empty_like(current)

            width = stop - start if pattern.sparsity is None or pattern.width is None else pattern.width
            for begin in range(0, stop - start, width):
                end = min(begin + width, stop - start)
                here = slice(start + begin, start + end)
                compensate(current, error, inverse, 0, begin, end)
                seen[:, here] = _costs(current[:, begin:end], factor[:, here, here], alive[:, here], units.width)
                part = replace(problem, pruned=None if problem.pruned is None else problem.pruned[:, here])
                mask = pattern.mask(part.ranked(to_rows(seen[:, here])), sparsity)
                kept[:, here] = mask.view(groups, rows // groups, end - begin).transpose(1, 2)
                drop = (~kept[:, here]).to(weight.dtype)
                for panel in range(begin, end, PANEL):
                    panel_end = min(panel + PANEL, end)
                    compensate(current, error, inverse, begin, panel, panel_end)
                    for j in range(panel, panel_end):
                        compensate(current, error, inverse, panel, j, j + 1)
                        torch.mul(current[:, j], drop[:, j - begin], out=error[:, j])
                        current[:, j].sub_(error[:, j])  # what is pruned is exactly zero now: x - x
                        error[:, j].div_(inverse[:, j, j, None])
            pruned[:, start:stop] = current
            removed[:, start:stop] = dense[:, start:stop] - current

        mask = to_rows(kept)
        # Where nothing is pruned nothing moves, but adding zeros would turn -0.0 into 0.0.
        solved = weight.clone() if mask.all() else to_rows(pruned)
        if self.rounding is not None:
            solved = round_columns(solved, factor, self.rounding)
        return Solution(solved, mask, to_rows(seen), pattern, notes)


def _costs(current: Tensor, factor: Tensor, alive: Tensor, width: int) -> Tensor:
    """The roots of what each weight adds to the cost of its unit, which is ``||W_P (U_PP)^-1||^2 = ||W_P R_PP||^2``.

    Args:
        current: ``[groups, columns, rows]``.
        factor: R of these columns, ``[groups, columns, columns]``.
        alive: ``[groups, columns]``: what multiplies a dead input costs nothing.
        width: columns of a unit.
    """
    if width == 1:
        return current.abs() * (factor.diagonal(dim1=1, dim2=2) * alive).unsqueeze(2)
    unit = torch.arange(factor.shape[1], device=factor.device) // width
    within = factor * alive.unsqueeze(2) * (unit.unsqueeze(0) == unit.unsqueeze(1))
    return (within.transpose(1, 2) @ current).abs()


def _costs_at_first(dense: Tensor, factor: Tensor, gram: Tensor, alive: Tensor, units: Units) -> Tensor:
    """What says how many units each block loses, ``[out, in]``, the same for all elements of a unit.

    It is the geometric mean of two costs of the dense weights: what removal costs when all later columns are free,
    which is what the sweep can make of it, and when nothing else moves. The first alone would load the early columns
    with more than a refit can make up for.
    """
    swept, alone = [], []
    for start in range(0, dense.shape[1], units.width):
        here = slice(start, min(start + units.width, dense.shape[1]))
        root = torch.linalg.cholesky(gram[:, here, here])
        swept.append(_costs(dense[:, here], factor[:, here, here], alive[:, here], units.width))
        alone.append(_costs(dense[:, here], root, alive[:, here], units.width))
    both = [units.scores(to_rows(torch.cat(costs, 1))) for costs in (swept, alone)]
    scores = torch.zeros(units.shape, dtype=both[0].dtype, device=dense.device)
    # The square root of the mean's, which the pattern squares.
    scores[: units.core[0], : units.core[1]] = units.spread((both[0] * both[1]) ** 0.25)
    return scores


def _blocks(
    pattern: SparsityPattern, problem: LayerProblem, sparsity: float, block_size: int, first: Tensor | None = None
) -> Iterator[tuple[int, int, float]]:
    """Column ranges whose mask is decided together, with the sparsity of each, so that the counts add up exactly.

    Each loses its share of the units, or as many as ``first``, a mask of the whole weight, prunes there.
    """
    rows, columns = problem.weight.shape
    unit = columns if pattern.width is None else pattern.width
    step = unit * math.ceil(block_size / max(unit, 1)) or 1
    share = sparsity  # of the units that may still be pruned, all but those that are already
    if pattern.sparsity is None and (fixed := _pruned_units(pattern, problem.pruned, columns)):
        all_units = pattern.units((rows, columns)).count
        share = (units_to_prune(all_units, sparsity) - fixed) / max(1, all_units - fixed)
    units = pruned = 0  # competing units and how many of them are pruned, up to the start of the block
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        if pattern.sparsity is not None:
            yield start, stop, sparsity
            continue
        if first is not None:
            inside = pattern.units((rows, stop - start))
            lost = inside.elements(inside.crop(~first[:, start:stop]))[..., 0]
            yield start, stop, int(lost.sum()) / max(1, inside.total)
            continue
        all_units = pattern.units((rows, stop)).count
        fixed = _pruned_units(pattern, problem.pruned, stop)
        all_pruned = fixed + units_to_prune(all_units - fixed, share)
        part = (all_pruned - pruned) / (all_units - units) if all_units > units else 0.0
        yield start, stop, part
        units, pruned = all_units, all_pruned


def _pruned_units(pattern: SparsityPattern, pruned: Tensor | None, stop: int) -> int:
    """How many units of each competition in the columns before ``stop`` stay pruned."""
    if pruned is None:
        return 0
    units = pattern.units((len(pruned), stop))
    whole = units.elements(units.crop(pruned[:, :stop])).all(2)
    return int(whole.sum(1).max()) if units.total else 0
