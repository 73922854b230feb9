"""Passes over all weights: in native code where it may run, else in torch operations on parts that fit the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur import kernels
from secateur.kernels import is_intercepted

# Keeps 1 / threshold finite where everything or nothing is pruned (threshold = inf, -inf) or all scores are zero.
TINY = 1e-30


def isa_of(*tensors: Tensor) -> str | None:
    """Return the instruction set of a native pass over these tensors, or None if torch operations have to serve.

    A native pass reads and writes plain memory. What records, batches, traces or watches torch
    operations cannot see it.
    """
    if is_intercepted() or torch.is_grad_enabled():  # gradients are recorded: a second derivative is wanted
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


def isa_of_elements(weights: Tensor, threshold: Tensor, temperature: Tensor, *grads: Tensor) -> str | None:
    """Return the same for weights ``[competitions, units]``, each of which is a unit."""
    fits = threshold.shape in (weights.shape, (len(weights), 1))
    return isa_of(weights, threshold, temperature, *grads) if fits else None


# Short rows: a broadcast or a sum over them is several times slower than the same along long ones.
_SHORT = 8


def over_units(value: Tensor, units: int) -> Tensor:
    """Return one number a competition, ``[competitions, 1]``, ready to be combined with ``[competitions, units]``."""
    if value.ndim < 2 or value.shape[1] > 1 or value.numel() == 1 or not 1 < units <= _SHORT:
        return value
    return value.view(-1).repeat_interleave(units).view(-1, units)


def sums_of_competitions(values: Tensor) -> Tensor:
    """Return the sums over the units of each competition, ``[competitions, 1]``."""
    if not 1 < values.shape[1] <= _SHORT:
        return values.sum(1, keepdim=True)
    first, *others = values.unbind(1)
    total = first.clone()
    for other in others:
        total += other
    return total.unsqueeze(1)


# Units up to this size each way are summed and multiplied natively, in parts of whole rows of units. A unit that is a
# row or column of the matrix has no such parts.
WIDE = 64


def unit_sums_of(a: Tensor, b: Tensor, height: int, width: int) -> Tensor:
    """Return the sum of ``a * b`` over each unit, ``[rows / height, columns / width]``."""
    if max(height, width) <= WIDE and (isa := isa_of(a, b)):
        return kernels.unit_sums(a, b, height, width, isa)
    matrix = a * b
    rows, columns = matrix.shape
    if height > 1:  # down the rows first, where memory is contiguous
        matrix = matrix.reshape(rows // height, height, columns).sum(1)
    return matrix.reshape(rows // height, columns // width, width).sum(2)


def times_units_of(
    matrix: Tensor,
    units: Tensor,
    height: int,
    width: int,
    *,
    plus: tuple[Tensor, Tensor] | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return a matrix times one number for each unit, plus another product of that kind if ``plus``.

    With ``in_place`` the result is written over the matrix.
    """
    if max(height, width) <= WIDE and (isa := isa_of(matrix, units, *(plus or ()))):
        return kernels.times_units(matrix, units, height, width, isa, plus=plus, owned=in_place)
    rows, columns = matrix.shape
    across = units.view(rows // height, columns // width)
    if 1 < width < columns:
        across = across.repeat_interleave(width, dim=1)
    shape = (rows // height, height, columns)
    product = (matrix.reshape(shape) * across.unsqueeze(1)).reshape(rows, columns)
    return product if plus is None else product.add_(times_units_of(*plus, height, width))


# Weights worked on at a time: intermediates stay in cache, and no fresh memory is asked for, which for a large weight
# costs several times the arithmetic.
_PART = 1 << 18


def several_parts(weights: Tensor) -> bool:
    """Return whether :func:`in_parts` cuts these weights."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # no second derivative goes through what is written
        return False
    return weights.device.type == "cpu" and weights.numel() > _PART


def in_parts(
    function: Callable[..., Tensor], weights: Tensor, threshold: Tensor, *others: Tensor, in_place: bool = False
) -> Tensor:
    """Return ``function(weights, threshold, *others)`` of ``[competitions, units]``, by parts that fit the cache.

    With ``in_place`` the result is written over the first of the others.
    """
    if not several_parts(weights):
        return function(weights, threshold, *others)
    like = others[0] if others else weights  # gradients may be batched where weights are not
    result = like if in_place else torch.empty_like(like)
    competitions, units = weights.shape
    if competitions == 1:
        for out, w, *rest in zip(*(x.split(_PART, 1) for x in (result, weights, *others)), strict=True):
            out.copy_(function(w, threshold, *rest))
    else:
        rows = max(1, _PART // units)
        for out, w, t, *rest in zip(*(x.split(rows) for x in (result, weights, threshold, *others)), strict=True):
            out.copy_(function(w, t, *rest))
    return result
