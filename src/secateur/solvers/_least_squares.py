"""Masked least squares: the best values of the weights that are kept, each row with a support of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from secateur._errors import SolverError
from secateur._types import Mask, Weight
from secateur.solvers._preconditioner import Preconditioner

_ROWS = 1 << 22  # elements of the rows that are solved together: what an iteration touches stays in the cache
_SYSTEM = 1 << 24  # elements of the systems that are factorised together
_DIRECT = 8.0  # what a multiplication of a small factorisation costs, in those of a large product
_SMALL = 1 << 31  # multiplications of a large product that take no time worth saving
_ENOUGH = 5e-3  # of the squared error, that is left to gain: the end of the iterations
_SHRINKS = 1 / 3, 0.9  # the factors by which gains are taken to shrink: a first one may be far more than the next


@torch.no_grad()
def fit(dense: Weight, start: Weight, kept: Mask, gram: Tensor, iterations: int, height: int = 1) -> Weight:
    r"""Return a weight with the same mask that is nearer to the dense one: :math:`\min_V \mathrm{tr}\,(W-V) H (W-V)^T`.

    Where the supports are small, or many rows share one, their systems are factorised, and the result is exact. The
    other rows are solved at once by conjugate gradients, which never raise an error. What preconditions them is the
    matrix's strongest directions and a diagonal, inverted for each row's mask: where inputs are correlated, as they are
    in trained models, that takes a third of the iterations that a diagonal alone takes, or less.

    Args:
        dense: ``[out, in]``, W.
        start: ``[out, in]``, zero outside the mask. What does not move keeps its bits.
        kept: ``[out, in]`` bool.
        gram: H, damped, ``[groups, in, in]``.
        iterations: of conjugate gradients, at most; they end where less than half a percent of the
            squared error seems left to gain.
        height: rows that share a mask: rows ``[0, height)``, ``[height, 2 height)`` and so on.

    Raises:
        SolverError: the Gram matrix or the weights are not finite.
    """
    result = start.clone()
    if not result.numel():
        return result
    size = max(1, _ROWS // dense.shape[1] // height) * height
    for group, h in enumerate(gram):
        rows = len(dense) // len(gram)
        shared = math.gcd(height, rows)  # a group may have a part of the rows that share a mask
        scale = h.diagonal().sqrt()
        unit = h / scale / scale.unsqueeze(1)
        near = cache(partial(Preconditioner.of, unit))  # where it is needed
        for first in range(group * rows, (group + 1) * rows, size):
            part = slice(first, min(first + size, (group + 1) * rows))
            lost = (dense[part] - start[part]) * scale
            step = _steps(lost, kept[part], unit, near, iterations, shared) / scale
            # Adding nothing would turn -0.0 into 0.0.
            result[part] = torch.where(step == 0, start[part], start[part] + step)
    return result


def _steps(
    lost: Tensor, kept: Mask, unit: Tensor, near: Callable[[], Preconditioner], iterations: int, height: int
) -> Tensor:
    """What to add to the start, for some rows and a matrix with a diagonal of ones."""
    residual = lost @ unit
    if not residual.isfinite().all():
        raise SolverError(
            "the Gram matrix or the weights have values that are not finite, or a product of both has.\n"
            "A least-squares fit needs finite inputs of the layer. Calibrate on other batches, or leave out '+refit'."
        )
    energy = torch.linalg.vecdot(lost, residual)
    residual *= kept
    steps = torch.zeros_like(residual)
    open_rows = residual.any(1)
    direct = _direct_rows(kept, open_rows, iterations, height)
    if direct.any():
        found, solved = _factorised(residual, kept, unit, direct, height)
        after = lost - found
        # A matrix that is singular up to rounding gives nonsense, which the other way does not.
        solved &= torch.linalg.vecdot(after, after @ unit) <= energy
        steps[solved] = found[solved]
        open_rows &= ~solved
    rows = open_rows.nonzero().flatten()
    if len(rows):
        steps[rows] = _gradients(residual[rows], energy[rows], kept[rows], unit, near(), iterations)
    return steps


def _direct_rows(kept: Mask, open_rows: Tensor, iterations: int, height: int) -> Tensor:
    """The rows whose systems are cheaper to factorise than to iterate on: all or none, bool ``[rows]``."""
    sizes = (kept.sum(1) * open_rows).view(-1, height).amax(1).double()
    cost = _DIRECT * (sizes**3 / 3 + 2 * height * sizes**2).sum()
    products = min(iterations, 4) * len(kept) * kept.shape[1] ** 2
    return open_rows & bool(cost <= max(products, _SMALL))


def _factorised(residual: Tensor, kept: Mask, unit: Tensor, rows: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """The exact steps of some rows, ``[rows, in]``, and which of them could be solved."""
    bands = rows.view(-1, height).any(1).nonzero().flatten()
    support = kept[::height][bands]
    sizes, order = support.sum(1).sort()
    bands, support = bands[order], support[order]
    right = residual.view(-1, height, residual.shape[1])
    found, solved = torch.zeros_like(right), torch.zeros(len(right), dtype=torch.bool, device=right.device)
    begin = 0
    while begin < len(bands):
        # From the back, so that the first system of a chunk is the largest.
        end = len(bands) - begin
        width = int(sizes[end - 1])
        count = max(1, min(end, _SYSTEM // max(1, width * width)))
        here = slice(end - count, end)
        columns = support[here].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = (torch.arange(width, device=unit.device) < sizes[here, None]).to(unit)
        systems = unit[columns.unsqueeze(2), columns.unsqueeze(1)]
        systems *= real.unsqueeze(2)
        systems *= real.unsqueeze(1)
        systems.diagonal(dim1=1, dim2=2).add_(1 - real)
        index = columns.unsqueeze(1).expand(-1, height, -1)
        factor, failed = torch.linalg.cholesky_ex(systems)
        values = torch.cholesky_solve(right[bands[here]].gather(2, index).mT, factor).mT
        found[bands[here]] = torch.zeros_like(right[bands[here]]).scatter(2, index, values)
        solved[bands[here]] = (failed == 0) & values.isfinite().all(2).all(1)
        begin += count
    return found.view_as(residual), solved.repeat_interleave(height) & rows


def _gradients(residual: Tensor, energy: Tensor, kept: Mask, unit: Tensor, near: Preconditioner, most: int) -> Tensor:
    """The steps of conjugate gradients, ``[rows, in]``, until what is left to gain is no longer worth a product.

    Args:
        residual: the slope, zero outside the mask; it is overwritten.
        energy: the errors at the start, ``[rows]``.
        kept: bool, as the residual.
        unit: the matrix, with a diagonal of ones.
        near: a stand-in for it.
        most: iterations.
    """
    inverse = near.within(kept)
    kept = kept.to(residual)
    steps, product = torch.zeros_like(residual), torch.empty_like(residual)
    direction = inverse(residual)
    square = torch.linalg.vecdot(residual, direction).unsqueeze(1)
    # A solved row's residual is the noise of rounding, which further steps would amplify: it stands still.
    noise = square * torch.finfo(square.dtype).eps ** 2
    left, before = float(energy.sum(dtype=torch.float64)), math.inf
    for _ in range(most):
        torch.mm(direction, unit, out=product).mul_(kept)
        curvature = torch.linalg.vecdot(direction, product).unsqueeze(1)
        length = torch.where((curvature > 0) & (square > noise), square / curvature, 0.0)
        steps.addcmul_(length, direction)
        gained = float((length * square).sum(dtype=torch.float64))
        left -= gained
        # If gains shrink by the same factor each time, all to come are a geometric series.
        shrinks = min(max(gained / before, _SHRINKS[0]), _SHRINKS[1]) if before else 0.0
        if gained * shrinks <= _ENOUGH * (1 - shrinks) * left:
            break
        before = gained
        residual.addcmul_(length, product, value=-1)
        close = inverse(residual)
        last, square = square, torch.linalg.vecdot(residual, close).unsqueeze(1)
        direction.mul_(torch.where(last > 0, square / last, 0.0)).add_(close)
    return steps
