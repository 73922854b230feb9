"""The differentiable magnitude mask: one formula for learned thresholds and for thresholds solved from a budget.

    score     s_u = |w|, or the root mean square of |w| over a unit of several elements
    mask      m_u = sigmoid((s_u - threshold) * slope)
    effective     = w * m

A *learned* threshold is a parameter with a gradient of its own and the slope is the layer's temperature. A *solved*
threshold lies halfway between the lowest kept and the highest pruned score of each competition, so that the mask sits
on the budget at every step, and the slope is temperature / threshold, so that neither the scale of the weights nor
weight decay changes how sharp the mask is.

A solved threshold moves with the scores. The backward pass therefore takes the derivative under the constraint that the
sum of the mask stays what it is: with q = dL/dm and k = dm/ds, the gradient of a score is k * (q - sum(k q) / sum(k)).
Without the second term the task can lower its loss only by raising all scores at once, which a budget undoes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur._pattern import SparsityPattern, cut_between, units_to_prune
from secateur._types import Weight

# Keeps 1 / threshold finite where everything or nothing is pruned (threshold = inf, -inf) or all scores are zero.
_TINY = 1e-30


def unit_scores(matrix: Weight, pattern: SparsityPattern) -> Tensor:
    """Scores ``[competitions, units]`` of a matrix without remainder: the root mean square of each unit."""
    units = pattern._units(matrix)
    if units.shape[2] == 1:
        return units[..., 0].abs()
    return torch.linalg.vector_norm(units, dim=2) * units.shape[2] ** -0.5


def solve_threshold(matrix: Weight, pattern: SparsityPattern, sparsity: float) -> Tensor:
    """The threshold of each competition, ``[competitions, 1]``, at which exactly the asked sparsity is pruned."""
    rows, columns = pattern._core(matrix.shape)
    scores = unit_scores(matrix[:rows, :columns], pattern)
    return cut_between(scores, units_to_prune(scores.shape[1], sparsity))


def hard_mask(matrix: Weight, threshold: Tensor, pattern: SparsityPattern) -> Tensor:
    """The mask without its slope, ``[out, in]`` bool: kept where the score reaches the threshold."""
    rows, columns = pattern._core(matrix.shape)
    mask = torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device)
    keep = unit_scores(matrix[:rows, :columns], pattern) >= threshold
    mask[:rows, :columns] = pattern._spread(keep, rows, columns)
    return mask


def gated(
    matrix: Weight, threshold: Tensor, temperature: Tensor, pattern: SparsityPattern, *, solved: bool, hard: bool
) -> Weight:
    """Return the effective weight ``matrix * mask``, with gradients to the matrix and to a learned threshold.

    Args:
        matrix: ``[out, in]``.
        threshold: broadcastable to the pattern's ``[competitions, units]``.
        temperature: a scalar tensor.
        pattern: what a unit is and what competes.
        solved: the threshold is solved from a budget, not learned.
        hard: use the hard mask forward, and the derivative of the soft one backward.
    """
    rows, columns = pattern._core(matrix.shape)
    if (rows, columns) == tuple(matrix.shape):
        return _Gate.apply(matrix, threshold, temperature, pattern, solved, hard)  # type: ignore[no-any-return,no-untyped-call]
    core = _Gate.apply(matrix[:rows, :columns], threshold, temperature, pattern, solved, hard)  # type: ignore[no-untyped-call]
    right = torch.cat([core, matrix[:rows, columns:]], 1)
    return torch.cat([right, matrix[rows:]])


class _Gate(torch.autograd.Function):
    """Saves its inputs only and computes the mask again in the backward pass: cheaper than keeping it in memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        matrix: Tensor, threshold: Tensor, temperature: Tensor, pattern: SparsityPattern, solved: bool, hard: bool
    ) -> Tensor:
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        units = pattern._units(wide)
        if units.shape[2] > 1:
            mask, _ = _mask_and_slope(unit_scores(wide, pattern), threshold, temperature, solved, hard)
            return (wide * pattern._spread(mask, *matrix.shape)).to(matrix.dtype)
        weights = units[..., 0]
        effective = torch.empty_like(weights)
        for w, t, out in _in_parts(weights, threshold, effective):
            mask, _ = _mask_and_slope(w.abs(), t, temperature, solved, hard)
            torch.mul(mask, w, out=out)
        return pattern._spread(effective, *matrix.shape).to(matrix.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        matrix, threshold, temperature, ctx.pattern, ctx.solved, ctx.hard = inputs
        ctx.save_for_backward(matrix, threshold, temperature)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        matrix, threshold, temperature = ctx.saved_tensors
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        grad = grad.to(wide.dtype)
        learned = not ctx.solved and ctx.needs_input_grad[1]
        backward = _backward_by_elements if ctx.pattern._units(wide).shape[2] == 1 else _backward_by_units
        by_matrix, by_threshold = backward(
            grad, wide, threshold, temperature, ctx.pattern, solved=ctx.solved, hard=ctx.hard, learned=learned
        )
        return by_matrix.to(matrix.dtype), by_threshold, None, None, None, None


def _backward_by_elements(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    pattern: SparsityPattern,
    *,
    solved: bool,
    hard: bool,
    learned: bool,
) -> tuple[Tensor, Tensor | None]:
    weights, grads = pattern._units(matrix)[..., 0], pattern._units(grad)[..., 0]
    by_weight = torch.empty_like(weights)
    by_threshold = torch.empty_like(threshold) if learned else None

    def score_gradient(w: Tensor, t: Tensor, g: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Write k q = dm/ds dL/dm to ``out``; return the mask and k."""
        scores = w.abs()
        mask, slope = _mask_and_slope(scores, t, temperature, solved, hard=False)
        pull = torch.addcmul(mask, mask, mask, value=-1).mul_(slope)
        torch.mul(g, w, out=out).mul_(pull)
        if hard:
            mask = (scores >= t).to(scores.dtype)
        return mask, pull

    one_competition = solved and len(weights) == 1
    shift: Tensor | float = 0.0
    if one_competition:  # its parts share their sums, so they are needed before the first part is finished
        pulls, products = threshold.new_zeros(()), threshold.new_zeros(())
        for w, t, g, out in _in_parts(weights, threshold, grads, by_weight):
            _, pull = score_gradient(w, t, g, out)
            pulls, products = pulls + pull.sum(), products + out.sum()
        shift = products / pulls.clamp_min(_TINY)
    for w, t, g, out, *to_threshold in _in_parts(
        weights, threshold, grads, by_weight, *([] if by_threshold is None else [by_threshold])
    ):
        mask, pull = score_gradient(w, t, g, out)
        if solved:
            if not one_competition:
                shift = out.sum(1, keepdim=True) / pull.sum(1, keepdim=True).clamp_min(_TINY)
            out.sub_(pull.mul_(shift))
        for by_t in to_threshold:
            torch.neg(out.sum_to_size(t.shape), out=by_t)
        out.mul_(torch.sign(w)).addcmul_(g, mask)  # ds/dw = sign(w)
    return pattern._spread(by_weight, *matrix.shape), by_threshold


def _backward_by_units(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    pattern: SparsityPattern,
    *,
    solved: bool,
    hard: bool,
    learned: bool,
) -> tuple[Tensor, None]:
    assert solved
    assert not learned
    scores = unit_scores(matrix, pattern)
    mask, slope = _mask_and_slope(scores, threshold, temperature, solved, hard=False)
    pull = torch.addcmul(mask, mask, mask, value=-1).mul_(slope)
    products = pattern._units(grad * matrix)
    by_score = products.sum(2).mul_(pull)
    shift = by_score.sum(1, keepdim=True) / pull.sum(1, keepdim=True).clamp_min(_TINY)
    by_score.addcmul_(pull, shift, value=-1)
    by_score.div_((scores * products.shape[2]).clamp_min_(_TINY))  # ds/dw = w / (elements * s)
    if hard:
        mask = (scores >= threshold).to(scores.dtype)
    by_matrix = matrix * pattern._spread(by_score, *matrix.shape)
    return by_matrix.addcmul_(grad, pattern._spread(mask, *matrix.shape)), None


def _mask_and_slope(
    scores: Tensor, threshold: Tensor, temperature: Tensor, solved: bool, hard: bool
) -> tuple[Tensor, Tensor]:
    if hard:
        return (scores >= threshold).to(scores.dtype), temperature
    slope = temperature / threshold.abs().clamp(_TINY, 1 / _TINY) if solved else temperature
    return (scores - threshold).mul_(slope).sigmoid_(), slope


# Weights worked on at a time: intermediates stay in cache, and no fresh memory is asked for, which for a large weight
# costs several times the arithmetic.
_PART = 1 << 17


def _in_parts(weights: Tensor, threshold: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut ``[competitions, units]`` tensors, and the threshold that broadcasts to them, into cache-sized parts."""
    competitions, units = weights.shape
    if torch.compiler.is_compiling() or weights.numel() <= _PART:
        return [(weights, threshold, *others)]
    if competitions == 1:
        cut = [tensor.split(_PART, 1) for tensor in (weights, *others)]
        return [(w, threshold, *rest) for w, *rest in zip(*cut, strict=True)]
    rows = max(1, _PART // units)
    return zip(*(tensor.split(rows) for tensor in (weights, threshold, *others)), strict=True)


class StraightThrough(torch.autograd.Function):
    """``weight * mask``, with the gradient of the product passed to every weight, kept or not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return weight * mask

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return grad, None
