"""The formula of the differentiable mask and its derivatives, see :mod:`secateur.nn._gate`, on plain matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur import kernels
from secateur._types import Weight
from secateur.nn._gate_passes import (
    TINY,
    WIDE,
    in_parts,
    isa_of_elements,
    over_units,
    several_parts,
    sums_of_competitions,
    times_units_of,
    unit_sums_of,
)
from secateur.patterns import Units


def unit_scores(matrix: Weight, units: Units) -> Tensor:
    """Scores ``[competitions, units]`` of a matrix without remainder: the root mean square of each unit."""
    height, width = units.height, units.width
    if units.size == 1:
        return units.elements(matrix)[..., 0].abs()
    norms: Tensor
    if height == 1 and width > WIDE:
        norms = torch.linalg.vector_norm(matrix.reshape(len(matrix), -1, width), dim=2)
    else:
        norms = unit_sums_of(matrix, matrix, height, width).sqrt_()
    scores: Tensor = norms.view(1, -1) * (height * width) ** -0.5
    return scores


def effective_weight(
    matrix: Tensor, threshold: Tensor, temperature: Tensor, units: Units, *, solved: bool, hard: bool
) -> Tensor:
    """Return ``matrix * mask``, in the matrix's dtype."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if units.size > 1:
        scores = unit_scores(wide, units)
        mask = (scores >= threshold).to(wide.dtype) if hard else _soft_mask(scores, threshold, temperature, solved)
        return times_units_of(wide, mask, units.height, units.width).to(matrix.dtype)

    def part(w: Tensor, t: Tensor) -> Tensor:
        scores = w.abs()
        mask = (scores >= t).to(w.dtype) if hard else _soft_mask_(scores, t, temperature, solved)
        return mask.mul_(w)

    weights = units.elements(wide)[..., 0]
    if isa := isa_of_elements(weights, threshold, temperature):
        result = kernels.gate(weights, threshold, float(temperature), isa, solved=solved, hard=hard)
        return result.view(matrix.shape).to(matrix.dtype)
    return in_parts(part, weights, threshold).view(matrix.shape).to(matrix.dtype)


def gradients(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    units: Units,
    *,
    solved: bool,
    hard: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the matrix and of a learned threshold, given that of the effective weight.

    With ``in_place`` the first is written over ``grad``, which nothing else may read.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    grad = grad.to(wide.dtype)
    if units.size > 1:
        by_units = _gradient_of_units(grad, wide, threshold, temperature, units, hard=hard, in_place=in_place)
        return by_units.to(matrix.dtype), None
    weights, grads = units.elements(wide)[..., 0], units.elements(grad)[..., 0]
    by_threshold = None
    if isa := isa_of_elements(weights, threshold, temperature, grads):
        by_matrix, by_threshold = kernels.gate_backward(
            grads, weights, threshold, float(temperature), isa, solved=solved, hard=hard, owned=in_place
        )
    elif solved:
        by_matrix = _gradient_solved(grads, weights, threshold, temperature, hard=hard, in_place=in_place)
    else:
        by_matrix, by_threshold = _gradients_learned(
            grads, weights, threshold, temperature, hard=hard, in_place=in_place
        )
    return by_matrix.view(matrix.shape).to(matrix.dtype), by_threshold


def _gradients_learned(
    grads: Tensor, weights: Tensor, threshold: Tensor, temperature: Tensor, *, hard: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    by_threshold = grads.new_empty(threshold.shape)

    def part(w: Tensor, t: Tensor, g: Tensor, by_t: Tensor) -> Tensor:
        scores = w.abs()
        kept = (scores >= t).to(w.dtype) if hard else None
        mask = _soft_mask_(scores, t, temperature, solved=False)
        rest = torch.addcmul(w, w, mask, value=-1)  # w (1 - m)
        through = g * mask
        pull = (through * rest).mul_(-temperature)  # -g w dm/d|w|, since dm/d|w| = temperature m (1 - m)
        by_t.copy_(pull.sum_to_size(t.shape))
        if kept is not None:
            through = g * kept
        return torch.addcmul(through, pull, torch.sign(w), value=-1)  # in place would spoil a second derivative

    return in_parts(part, weights, threshold, grads, by_threshold, in_place=in_place), by_threshold


def _gradient_solved(
    grads: Tensor, weights: Tensor, threshold: Tensor, temperature: Tensor, *, hard: bool, in_place: bool
) -> Tensor:
    """``g m + k (g w - shift) sign(w) temperature / threshold``, with k = m (1 - m)."""

    def shares(mask: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of k g w and of k over each competition."""
        pull = torch.addcmul(mask, mask, mask, value=-1)
        products = (g * w).mul_(pull)
        return sums_of_competitions(products), sums_of_competitions(pull)

    shift: Tensor | None = None
    masks: Tensor | None = None
    if len(weights) == 1 and several_parts(weights):
        # Parts of one competition share their sums, so a first round is needed before any part can be finished.
        sums = []

        def first_round(w: Tensor, t: Tensor, g: Tensor) -> Tensor:
            mask = _soft_mask_(w.abs(), t, temperature, solved=True)
            sums.append(torch.cat(shares(mask, w, g)))
            return mask

        masks = in_parts(first_round, weights, threshold, grads)
        products, pulls = torch.stack(sums).sum(0).unbind()
        shift = (products / pulls.clamp_min(TINY)).view(1, 1)

    def part(w: Tensor, t: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = w.abs()
        kept = (scores >= t).to(w.dtype) if hard else None
        if mask is None:
            mask = _soft_mask_(scores, t, temperature, solved=True)
        moved = shift
        if moved is None:
            products, pulls = shares(mask, w, g)
            moved = products.div_(pulls.clamp_min_(TINY))
        slope = _slope(t, temperature)
        pull = torch.addcmul(mask, mask, mask, value=-1)
        by_score = (g * w).sub_(over_units(moved, w.shape[1])).mul_(pull)
        by_score.mul_(torch.sign(w)).mul_(over_units(slope, w.shape[1]))
        return by_score.addcmul_(g, mask if kept is None else kept)

    return in_parts(part, weights, threshold, grads, *([] if masks is None else [masks]), in_place=in_place)


def _gradient_of_units(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    units: Units,
    *,
    hard: bool,
    in_place: bool,
) -> Tensor:
    height, width = units.height, units.width
    scores = unit_scores(matrix, units)
    mask = _soft_mask(scores, threshold, temperature, solved=True)
    pull = torch.addcmul(mask, mask, mask, value=-1)
    by_score = unit_sums_of(grad, matrix, height, width).view(1, -1)
    shift = (by_score * pull).sum(1, keepdim=True) / pull.sum(1, keepdim=True).clamp_min(TINY)
    by_score = (by_score - shift).mul_(pull).mul_(_slope(threshold, temperature))
    by_score.div_((scores * (height * width)).clamp_min_(TINY))  # ds/dw = w / (elements * s)
    if hard:
        mask = (scores >= threshold).to(scores.dtype)
    return times_units_of(grad, mask, height, width, plus=(matrix, by_score), in_place=in_place)


def _slope(threshold: Tensor, temperature: Tensor) -> Tensor:
    """The slope at a solved threshold; flat where the budget keeps or prunes everything."""
    return torch.where(threshold.isinf(), 0.0, temperature / threshold.clamp_min(TINY))


def _soft_mask(scores: Tensor, threshold: Tensor, temperature: Tensor, solved: bool) -> Tensor:
    return _soft_mask_(scores.clone(), threshold, temperature, solved)


def _soft_mask_(scores: Tensor, threshold: Tensor, temperature: Tensor, solved: bool) -> Tensor:
    """The mask, written over the scores."""
    if not solved:
        return scores.sub_(threshold).mul_(temperature).sigmoid_()
    # An infinite threshold, of a budget that keeps or prunes everything, becomes an infinite offset. All competitions
    # prune the same number, so that one offset serves them all, and a pass over the scores is saved.
    offset = torch.where(threshold[:1].isinf(), threshold[:1], temperature)
    slope = over_units(_slope(threshold, temperature), scores.shape[1])
    return scores.mul_(slope).sub_(offset).sigmoid_()
