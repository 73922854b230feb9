"""Prune units that span all rows, one after the other, each the cheapest when all others take over from it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._types import Mask, Scores, Weight
from secateur.patterns import units_to_prune
from secateur.solvers._gram import damped
from secateur.solvers._least_squares import fit
from secateur.solvers._problem import LayerProblem
from secateur.solvers._remove import remove_columns

_FIT = 50  # all rows have one support, so that the fit is a factorisation, unless that fails


def whole_columns(problem: LayerProblem, gram: Tensor, damping: float) -> tuple[Weight, Mask, Scores]:
    """Return the weight, the mask and the scores of a pattern whose units have all rows.

    Args:
        problem: with a pattern whose scope is not open.
        gram: ``[groups, in, in]``.
        damping: with which it is positive definite.
    """
    weight, pattern = problem.weight, problem.pattern
    units = pattern.units(weight.shape)
    columns = torch.arange(units.core[1], device=weight.device).view(units.count, units.width)
    gone = torch.zeros(units.count, dtype=torch.bool, device=weight.device)
    if problem.pruned is not None:
        gone = units.elements(units.crop(problem.pruned)).all(2)[0]
    # What an earlier round pruned cannot make up for anything: as if its input was never active.
    open_columns = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    open_columns[columns[gone]] = False
    left = gram * open_columns * open_columns.unsqueeze(1)
    before, after = (float(h.diagonal(dim1=1, dim2=2).mean()) for h in (gram, left))
    # Of equal units the last goes, as under every pattern.
    candidates = (~gone).nonzero().flatten().flip(0)
    prune = units_to_prune(units.count, pattern.resolve(problem.sparsity)) - int(gone.sum())
    scaled = damping * before / after if after > 0 else damping
    if not prune:  # nothing goes beside what went
        order, costs = candidates[:0], gram.new_zeros(0, dtype=torch.float64)
    else:
        order, costs = remove_columns(weight, left, columns[candidates], len(candidates) - prune, damping=scaled)
    kept = ~gone
    kept[candidates[order]] = False
    mask = units.mask(kept.unsqueeze(0))
    solved = fit(weight, weight.masked_fill(~mask, 0), mask, damped(gram, damping), _FIT, units.height)
    return solved, mask, _scores(problem, gram, mask, candidates[order], costs)


def _scores(problem: LayerProblem, gram: Tensor, mask: Mask, order: Tensor, costs: Tensor) -> Scores:
    """Scores that give this mask: the error when a unit went, and for what stays its own size, which is above it."""
    weight, units = problem.weight, problem.pattern.units(problem.weight.shape)
    roots = gram.diagonal(dim1=1, dim2=2).sqrt().repeat_interleave(len(weight) // len(gram), 0)
    scores = weight.abs() * roots
    if not len(order):
        return scores
    went = (costs / units.size).sqrt().to(scores)
    values = torch.zeros(1, units.count).to(scores)
    values[0, order] = went
    return torch.where(mask, scores.clamp_min(float(went.max())), _filled(units.spread(values), scores))


def _filled(core: Tensor, like: Tensor) -> Tensor:
    """A core as a whole matrix, with zeros beyond it."""
    whole = torch.zeros_like(like)
    whole[: core.shape[0], : core.shape[1]] = core
    return whole
