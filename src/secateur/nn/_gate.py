"""The differentiable magnitude mask: one formula for learned thresholds and for thresholds solved from a budget.

    score     s_u = |w|, or the root mean square of |w| over a unit of several elements
    mask      m_u = sigmoid((s_u - threshold) * slope)
    effective     = w * m

A *learned* threshold is a parameter with a gradient of its own and the slope is the layer's temperature. A *solved*
threshold lies halfway between the lowest kept and the highest pruned score of each competition, so that the mask sits
on the budget at every step, and the slope is temperature / threshold, so that neither the scale of the weights nor
weight decay changes how sharp the mask is.

A solved threshold moves with the scores. The backward pass therefore takes the derivative under the constraint that the
sum of the mask is constant: with q = dL/dm and k = dm/ds, the gradient of a score is k * (q - sum(k q) / sum(k)).
Without the second term the task can lower its loss only by raising all scores at once, which a budget undoes.

``_gate_formula`` has the formula and its derivatives. Where ``_gate_passes.isa_of`` finds plain memory, native code
computes them: if each weight is a unit, in one pass over the weights forward and one or two backward; else those
operations that touch every weight of a larger unit. Torch operations are the reference, and serve everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from secateur._types import Weight
from secateur.nn._gate_formula import effective_weight, gradients, unit_scores
from secateur.patterns import Units, cut_between, units_to_prune

_not_a_view = torch.ops.aten._unsafe_view.default


@torch.no_grad()
def solve_threshold(matrix: Weight, units: Units, sparsity: float, near: float | None = None) -> Tensor:
    """The threshold of each competition, ``[competitions, 1]``, at which exactly the asked sparsity is pruned."""
    return cut_between(unit_scores(units.crop(matrix), units), units_to_prune(units.count, sparsity), near)


@torch.no_grad()
def hard_mask(matrix: Weight, threshold: Tensor, units: Units) -> Tensor:
    """The mask without its slope, ``[out, in]`` bool: kept where the score reaches the threshold."""
    return units.mask(unit_scores(units.crop(matrix), units) >= threshold)


def gated(matrix: Weight, threshold: Tensor, temperature: Tensor, units: Units, *, solved: bool, hard: bool) -> Weight:
    """Return the effective weight ``matrix * mask``, with gradients to the matrix and to a learned threshold.

    Args:
        matrix: ``[out, in]``.
        threshold: broadcastable to the pattern's ``[competitions, units]``.
        temperature: a scalar tensor.
        units: of the matrix: what is kept or pruned together, and what competes.
        solved: the threshold is solved from a budget, not learned.
        hard: use the hard mask forward, and the derivative of the soft one backward.
    """
    core = _Gate.apply(units.crop(matrix), threshold, temperature, units, solved, hard)  # type: ignore[no-untyped-call]
    if units.core == units.shape:
        return core  # type: ignore[no-any-return]
    rows, columns = units.core
    right = torch.cat([core, matrix[:rows, columns:]], 1)
    return torch.cat([right, matrix[rows:]])


def gated_linear(
    x: Tensor,
    matrix: Weight,
    bias: Tensor | None,
    threshold: Tensor,
    temperature: Tensor,
    units: Units,
    *,
    solved: bool,
    hard: bool,
) -> Tensor:
    """Return ``x @ gated(...).T + bias``, as one node of the graph: its backward pass needs no memory of its own."""
    if units.core != units.shape:
        weight = gated(matrix, threshold, temperature, units, solved=solved, hard=hard)
        return F.linear(x, weight, bias)
    y, _ = _GatedLinear.apply(x, matrix, bias, threshold, temperature, units, solved, hard)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]


class _Gate(torch.autograd.Function):
    """Saves its inputs only and computes the mask again in the backward pass: cheaper than keeping it in memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, threshold: Tensor, temperature: Tensor, units: Units, solved: bool, hard: bool
    ) -> Tensor:
        return effective_weight(matrix, threshold, temperature, units, solved=solved, hard=hard)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        matrix, threshold, temperature, ctx.units, ctx.solved, ctx.hard = inputs
        ctx.save_for_backward(matrix, threshold, temperature)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        matrix, threshold, temperature = ctx.saved_tensors
        by_matrix, by_threshold = gradients(
            grad, matrix, threshold, temperature, ctx.units, solved=ctx.solved, hard=ctx.hard
        )
        return by_matrix, by_threshold, None, None, None, None


class _GatedLinear(torch.autograd.Function):
    """The gate and the product. Nothing else reads the gradient of the effective weight, so it is overwritten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        temperature: Tensor,
        units: Units,
        solved: bool,
        hard: bool,
    ) -> tuple[Tensor, Tensor]:
        effective = effective_weight(matrix, threshold, temperature, units, solved=solved, hard=hard)
        y = F.linear(x, effective, bias)
        if x.ndim != 2:
            # Then it is a view. PyTorch lets no operation change a view in place that is one of several results of a
            # function, but nn.ReLU(inplace=True) and y += x have to work after this layer.
            y = _not_a_view(y, y.shape)
        return y, effective

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, matrix, _, threshold, temperature, ctx.units, ctx.solved, ctx.hard = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, matrix, threshold, temperature, output[1])

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        x, matrix, threshold, temperature, effective = ctx.saved_tensors
        by_x = by_matrix = by_bias = by_threshold = None
        if grad is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the saved one has no graph
            effective = _Gate.apply(matrix, threshold, temperature, ctx.units, ctx.solved, ctx.hard)  # type: ignore[no-untyped-call]
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            by_x = (grad @ effective.to(grad.dtype)).to(x.dtype)  # autocast may have made the output's dtype another
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            by_effective = rows.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            by_matrix, by_threshold = gradients(
                by_effective, matrix, threshold, temperature, ctx.units, solved=ctx.solved, hard=ctx.hard, in_place=True
            )
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0).to(matrix.dtype)
        return by_x, by_matrix, by_bias, by_threshold, None, None, None, None
