"""The damped Gram matrix that second-order solvers share: inputs that never fire, damping, factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._errors import SolverError, StatisticsError
from secateur._types import Weight
from secateur.calibration import LayerStatistics


def gram_for(weight: Weight, statistics: LayerStatistics | None) -> Tensor:
    """The Gram matrix as ``[groups, in, in]`` in the weight's dtype and on its device, checked to fit the weight.

    Raises:
        StatisticsError: there is none, or it does not fit.
    """
    if statistics is None:
        raise StatisticsError("it needs calibration inputs: pass batches.")
    gram = statistics.require("gram").to(weight)
    if gram.shape[1:] != (weight.shape[1], weight.shape[1]) or weight.shape[0] % gram.shape[0]:
        raise StatisticsError(f"a gram of shape {tuple(gram.shape)} does not fit a weight {tuple(weight.shape)}.")
    return gram


def damped(gram: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag(H)) * I``, with a unit of that mean where an input is dead (``H_jj = 0``).

    A dead input has a zero row and column, so any positive diagonal makes it factorise and none changes the others.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean == 0, 1.0, mean)
    result = gram.clone()
    result.diagonal(dim1=1, dim2=2).add_(torch.where(diagonal == 0, mean, damping * mean))
    return result


def upper_factor(weight: Weight, statistics: LayerStatistics, damping: float) -> tuple[Tensor, float]:
    """Upper triangular R with ``R @ R.T = damped(H)``, and the damping that it took.

    ``inv(R)`` is the upper Cholesky factor of ``inv(H)``, the matrix that SparseGPT is usually written with. R needs
    one factorisation and no inverse. When a factorisation fails, the damping is raised tenfold (to 0.01 at
    least), up to 1. The factor is kept with the statistics, for the next layer that reads the same inputs.

    Raises:
        SolverError: H is not positive definite even with damping 1.
    """
    key = (damping, weight.dtype, weight.device)
    if key not in statistics.factors:
        statistics.factors[key] = _factorise(gram_for(weight, statistics), damping)
    return statistics.factors[key]


def _factorise(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    # Reversing rows and columns turns the lower factor that LAPACK gives into the upper one.
    factor, used = lower_factor(gram.flip(1, 2), damping)
    return factor.flip(1, 2), used


def lower_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower triangular L with ``L @ L.T = damped(gram)``, and the damping that it took, raised as for the upper one.

    Raises:
        SolverError: the matrix is not positive definite even with damping 1.
    """
    attempt = damping
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(gram, attempt))
        if not failed.any() and factor.isfinite().all():
            return factor, attempt
        if attempt >= 1:
            raise SolverError(
                f"the Gram matrix is not positive definite, even with a damping of {attempt:g}.\n"
                "Calibrate on more or other text, or use a method without a factorisation, such as 'wanda'."
            )
        attempt = min(1.0, max(attempt, 1e-3) * 10)


def scaled_gram(weight: Weight, statistics: LayerStatistics, damping: float) -> tuple[Tensor, float]:
    """The damped Gram matrix of scaled inputs, ``[groups, in, in]``, and the damping that it took.

    First every input is scaled to norm 1, and the damping is added to the ones of the diagonal, so that each input is
    damped by a fraction of itself; a dead input has a one too. Then inputs are scaled once more so that the inverse has
    the same number everywhere on its diagonal: the square of a weight is then the cost of its loss, if all others make
    up for it, whatever its input. The mean of the result's diagonal is one, without dead inputs.

    The damping is raised as for a factor, and the matrix is kept with the statistics.

    Raises:
        SolverError: the matrix is not positive definite even with damping 1.
    """
    key = ("scaled", damping, weight.dtype, weight.device)
    if key not in statistics.factors:
        gram = gram_for(weight, statistics)
        norm = gram.diagonal(dim1=1, dim2=2).sqrt()
        dead = norm == 0
        norm = norm.masked_fill(dead, 1)
        unit = gram / norm.unsqueeze(1) / norm.unsqueeze(2)
        unit.diagonal(dim1=1, dim2=2).add_(dead)
        factor, used = lower_factor(unit, damping)
        unit = damped(unit, used)
        identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        scale = torch.linalg.solve_triangular(factor, identity, upper=False).norm(dim=1)  # sqrt of inv(unit)_jj
        total = (scale**2 * ~dead).sum(1, keepdim=True) * (1 + used)
        scale = scale * ((~dead).sum(1, keepdim=True).clamp(min=1) / torch.where(total > 0, total, 1)).sqrt()
        unit *= scale.unsqueeze(1)
        unit *= scale.unsqueeze(2)
        statistics.factors[key] = unit, used
    return statistics.factors[key]


def inverse(gram: Tensor, damping: float) -> Tensor:
    """The inverse of one damped matrix ``[in, in]``.

    Raises:
        SolverError: the matrix is not positive definite even with damping 1.
    """
    factor, _ = lower_factor(gram.unsqueeze(0), damping)
    # cholesky_inverse takes up to ten times as long where another process uses a core.
    return torch.cholesky_solve(torch.eye(len(gram), dtype=gram.dtype, device=gram.device), factor[0])
