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

Where :func:`_isa` says so, native code does this: in one pass over the weights forward and one or two backward if each
weight is a unit of its own, else what touches every weight of a block. The torch operations below are its reference and
serve everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from secateur import kernels
from secateur._types import Weight
from secateur.kernels import is_watched
from secateur.patterns import Units, cut_between, units_to_prune

# Keeps 1 / threshold finite where everything or nothing is pruned (threshold = inf, -inf) or all scores are zero.
_TINY = 1e-30


def unit_scores(matrix: Weight, units: Units) -> Tensor:
    """Scores ``[competitions, units]`` of a matrix without remainder: the root mean square of each unit."""
    height, width = units.height, units.width
    if units.size == 1:
        return units.elements(matrix)[..., 0].abs()
    norms: Tensor
    if height == 1 and width > _WIDE:
        norms = torch.linalg.vector_norm(matrix.reshape(len(matrix), -1, width), dim=2)
    else:
        norms = _unit_sums(matrix, matrix, height, width).sqrt_()
    scores: Tensor = norms.view(1, -1) * (height * width) ** -0.5
    return scores


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
        return _forward(matrix, threshold, temperature, units, solved=solved, hard=hard)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        matrix, threshold, temperature, ctx.units, ctx.solved, ctx.hard = inputs
        ctx.save_for_backward(matrix, threshold, temperature)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        matrix, threshold, temperature = ctx.saved_tensors
        by_matrix, by_threshold = _backward(
            grad, matrix, threshold, temperature, ctx.units, solved=ctx.solved, hard=ctx.hard
        )
        return by_matrix, by_threshold, None, None, None, None


class _GatedLinear(torch.autograd.Function):
    """The gate and the product. The gradient of the effective weight is nobody else's, so it is worked on in place."""

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
        effective = _forward(matrix, threshold, temperature, units, solved=solved, hard=hard)
        return F.linear(x, effective, bias), effective

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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the kept one has no derivative of its own
            effective = _Gate.apply(matrix, threshold, temperature, ctx.units, ctx.solved, ctx.hard)  # type: ignore[no-untyped-call]
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            by_x = (grad @ effective.to(grad.dtype)).to(x.dtype)  # autocast may have made the output's dtype another
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            by_effective = rows.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            by_matrix, by_threshold = _backward(
                by_effective, matrix, threshold, temperature, ctx.units, solved=ctx.solved, hard=ctx.hard, owned=True
            )
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0).to(matrix.dtype)
        return by_x, by_matrix, by_bias, by_threshold, None, None, None, None


def _forward(
    matrix: Tensor, threshold: Tensor, temperature: Tensor, units: Units, *, solved: bool, hard: bool
) -> Tensor:
    """``matrix * mask``."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if units.size > 1:
        scores = unit_scores(wide, units)
        mask = (scores >= threshold).to(wide.dtype) if hard else _soft_mask(scores, threshold, temperature, solved)
        return _times_units(wide, mask, units.height, units.width).to(matrix.dtype)

    def part(w: Tensor, t: Tensor) -> Tensor:
        scores = w.abs()
        mask = (scores >= t).to(w.dtype) if hard else _soft_mask_(scores, t, temperature, solved)
        return mask.mul_(w)

    weights = units.elements(wide)[..., 0]
    if isa := _isa_of_elements(weights, threshold, temperature):
        result = kernels.gate(weights, threshold, float(temperature), isa, solved=solved, hard=hard)
        return result.view(matrix.shape).to(matrix.dtype)
    return _in_parts(part, weights, threshold).view(matrix.shape).to(matrix.dtype)


def _backward(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    units: Units,
    *,
    solved: bool,
    hard: bool,
    owned: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the matrix and of a learned threshold; ``owned``: nobody else has ``grad``, write over it."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    grad = grad.to(wide.dtype)
    if units.size > 1:
        by_units = _backward_of_units(grad, wide, threshold, temperature, units, hard=hard, owned=owned)
        return by_units.to(matrix.dtype), None
    weights, grads = units.elements(wide)[..., 0], units.elements(grad)[..., 0]
    by_threshold = None
    if isa := _isa_of_elements(weights, threshold, temperature, grads):
        by_matrix, by_threshold = kernels.gate_backward(
            grads, weights, threshold, float(temperature), isa, solved=solved, hard=hard, owned=owned
        )
    elif solved:
        by_matrix = _backward_solved(grads, weights, threshold, temperature, hard=hard, owned=owned)
    else:
        by_matrix, by_threshold = _backward_learned(grads, weights, threshold, temperature, hard=hard, owned=owned)
    return by_matrix.view(matrix.shape).to(matrix.dtype), by_threshold


def _isa(*tensors: Tensor) -> str | None:
    """The instruction set of a native pass over these tensors, or None where it cannot serve.

    It reads and writes plain memory. Whatever records, batches, traces or watches torch's operations would miss it.
    """
    if is_watched() or torch.is_grad_enabled():  # a backward pass that is to be differentiated again
        return None
    plain = all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        for tensor in tensors
    )
    return kernels.current_isa() if plain and tensors[0].numel() else None


def _isa_of_elements(weights: Tensor, threshold: Tensor, temperature: Tensor, *grads: Tensor) -> str | None:
    """The same for weights ``[competitions, units]`` that are units each."""
    fits = threshold.shape in (weights.shape, (len(weights), 1))
    return _isa(weights, threshold, temperature, *grads) if fits else None


def _backward_learned(
    grads: Tensor, weights: Tensor, threshold: Tensor, temperature: Tensor, *, hard: bool, owned: bool
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

    return _in_parts(part, weights, threshold, grads, by_threshold, owned=owned), by_threshold


def _backward_solved(
    grads: Tensor, weights: Tensor, threshold: Tensor, temperature: Tensor, *, hard: bool, owned: bool
) -> Tensor:
    """``g m + k (g w - shift) sign(w) temperature / threshold``, with k = m (1 - m)."""

    def shares(mask: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of k g w and of k over each competition."""
        pull = torch.addcmul(mask, mask, mask, value=-1)
        products = (g * w).mul_(pull)
        return _sum_units(products), _sum_units(pull)

    shift: Tensor | None = None
    masks: Tensor | None = None
    if len(weights) == 1 and _several_parts(weights):
        # Parts of one competition share their sums, so a first round is needed before any part can be finished.
        sums = []

        def first_round(w: Tensor, t: Tensor, g: Tensor) -> Tensor:
            mask = _soft_mask_(w.abs(), t, temperature, solved=True)
            sums.append(torch.cat(shares(mask, w, g)))
            return mask

        masks = _in_parts(first_round, weights, threshold, grads)
        products, pulls = torch.stack(sums).sum(0).unbind()
        shift = (products / pulls.clamp_min(_TINY)).view(1, 1)

    def part(w: Tensor, t: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = w.abs()
        kept = (scores >= t).to(w.dtype) if hard else None
        if mask is None:
            mask = _soft_mask_(scores, t, temperature, solved=True)
        moved = shift
        if moved is None:
            products, pulls = shares(mask, w, g)
            moved = products.div_(pulls.clamp_min_(_TINY))
        slope = _slope(t, temperature)
        pull = torch.addcmul(mask, mask, mask, value=-1)
        by_score = (g * w).sub_(_over_units(moved, w.shape[1])).mul_(pull)
        by_score.mul_(torch.sign(w)).mul_(_over_units(slope, w.shape[1]))
        return by_score.addcmul_(g, mask if kept is None else kept)

    return _in_parts(part, weights, threshold, grads, *([] if masks is None else [masks]), owned=owned)


def _backward_of_units(
    grad: Tensor,
    matrix: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    units: Units,
    *,
    hard: bool,
    owned: bool,
) -> Tensor:
    height, width = units.height, units.width
    scores = unit_scores(matrix, units)
    mask = _soft_mask(scores, threshold, temperature, solved=True)
    pull = torch.addcmul(mask, mask, mask, value=-1)
    by_score = _unit_sums(grad, matrix, height, width).view(1, -1)
    shift = (by_score * pull).sum(1, keepdim=True) / pull.sum(1, keepdim=True).clamp_min(_TINY)
    by_score = (by_score - shift).mul_(pull).mul_(_slope(threshold, temperature))
    by_score.div_((scores * (height * width)).clamp_min_(_TINY))  # ds/dw = w / (elements * s)
    if hard:
        mask = (scores >= threshold).to(scores.dtype)
    return _times_units(grad, mask, height, width, plus=(matrix, by_score), owned=owned)


def _slope(threshold: Tensor, temperature: Tensor) -> Tensor:
    """The slope at a solved threshold; flat where the budget keeps or prunes everything."""
    return torch.where(threshold.isinf(), 0.0, temperature / threshold.clamp_min(_TINY))


def _soft_mask(scores: Tensor, threshold: Tensor, temperature: Tensor, solved: bool) -> Tensor:
    return _soft_mask_(scores.clone(), threshold, temperature, solved)


def _soft_mask_(scores: Tensor, threshold: Tensor, temperature: Tensor, solved: bool) -> Tensor:
    """The mask, in the place of the scores."""
    if not solved:
        return scores.sub_(threshold).mul_(temperature).sigmoid_()
    # An infinite threshold, of a budget that keeps or prunes everything, becomes an infinite offset. All competitions
    # prune the same number, so that one offset serves them all, and a pass over the scores is saved.
    offset = torch.where(threshold[:1].isinf(), threshold[:1], temperature)
    slope = _over_units(_slope(threshold, temperature), scores.shape[1])
    return scores.mul_(slope).sub_(offset).sigmoid_()


# Short rows: a broadcast or a sum over them is several times slower than the same along long ones.
_SHORT = 8


def _over_units(value: Tensor, units: int) -> Tensor:
    """One number a competition, ``[competitions, 1]``, made ready to be combined with ``[competitions, units]``."""
    if value.ndim < 2 or value.shape[1] > 1 or value.numel() == 1 or not 1 < units <= _SHORT:
        return value
    return value.view(-1).repeat_interleave(units).view(-1, units)


def _sum_units(values: Tensor) -> Tensor:
    """Sums over the units of each competition, ``[competitions, 1]``."""
    if not 1 < values.shape[1] <= _SHORT:
        return values.sum(1, keepdim=True)
    first, *others = values.unbind(1)
    total = first.clone()
    for other in others:
        total += other
    return total.unsqueeze(1)


# Units up to this size each way are summed and multiplied natively, in parts of whole rows of units. A unit that is a
# row or column of the matrix has no such parts.
_WIDE = 64


def _unit_sums(a: Tensor, b: Tensor, height: int, width: int) -> Tensor:
    """The sum of ``a * b`` over each unit, ``[rows / height, columns / width]``."""
    if max(height, width) <= _WIDE and (isa := _isa(a, b)):
        return kernels.unit_sums(a, b, height, width, isa)
    matrix = a * b
    rows, columns = matrix.shape
    if height > 1:  # down the rows first, where memory is contiguous
        matrix = matrix.reshape(rows // height, height, columns).sum(1)
    return matrix.reshape(rows // height, columns // width, width).sum(2)


def _times_units(
    matrix: Tensor,
    units: Tensor,
    height: int,
    width: int,
    *,
    plus: tuple[Tensor, Tensor] | None = None,
    owned: bool = False,
) -> Tensor:
    """A matrix times one number for each unit, plus another times another; written over the first if ``owned``."""
    if max(height, width) <= _WIDE and (isa := _isa(matrix, units, *(plus or ()))):
        return kernels.times_units(matrix, units, height, width, isa, plus=plus, owned=owned)
    rows, columns = matrix.shape
    across = units.view(rows // height, columns // width)
    if 1 < width < columns:
        across = across.repeat_interleave(width, dim=1)
    shape = (rows // height, height, columns)
    product = (matrix.reshape(shape) * across.unsqueeze(1)).reshape(rows, columns)
    return product if plus is None else product.add_(_times_units(*plus, height, width))


# Weights worked on at a time: intermediates stay in cache, and no fresh memory is asked for, which for a large weight
# costs several times the arithmetic.
_PART = 1 << 18


def _several_parts(weights: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # no second derivative goes through what is written
        return False
    return weights.device.type == "cpu" and weights.numel() > _PART


def _in_parts(
    function: Callable[..., Tensor], weights: Tensor, threshold: Tensor, *others: Tensor, owned: bool = False
) -> Tensor:
    """``function(weights, threshold, *others)`` on ``[competitions, units]``, a cache-sized part at a time.

    The result is written over the first of the others if that is ``owned``.
    """
    if not _several_parts(weights):
        return function(weights, threshold, *others)
    like = others[0] if others else weights  # gradients may be batched where weights are not
    result = like if owned else torch.empty_like(like)
    competitions, units = weights.shape
    if competitions == 1:
        for out, w, *rest in zip(*(x.split(_PART, 1) for x in (result, weights, *others)), strict=True):
            out.copy_(function(w, threshold, *rest))
    else:
        rows = max(1, _PART // units)
        for out, w, t, *rest in zip(*(x.split(rows) for x in (result, weights, threshold, *others)), strict=True):
            out.copy_(function(w, t, *rest))
    return result
