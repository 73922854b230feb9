"""Let the columns that stay take over from those that go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._checks import number
from secateur._errors import PatternError
from secateur._types import Weight
from secateur.calibration import LayerStatistics
from secateur.solvers._gram import gram_for, lower_factor
from secateur.solvers._units import features_for


@dataclass(frozen=True, eq=False)
class Refitted:
    """A weight without some of its columns.

    Args:
        weight: ``[out, in]``, zero in the columns that go, in the dtype of the original.
        bias_shift: ``[out]``, what the layer's bias gains, in the same dtype; None without a bias.
        error_before: squared error of the output over all tokens when the columns just go.
        error_after: the same with the new weight and bias.
        energy: squared output over all tokens of the original weight, without its bias.
    """

    weight: Weight
    bias_shift: Tensor | None
    error_before: float
    error_after: float
    energy: float


@torch.no_grad()
def refit_columns(
    weight: Weight,
    statistics: LayerStatistics | None,
    kept: Tensor,
    *,
    bias: bool,
    weights: bool = True,
    damping: float = 0.01,
) -> Refitted:
    r"""Return a weight that is zero in some columns, and whose other columns make up for them as well as they can.

    :math:`\min_{V, b} \lVert W X - V X - b \rVert^2 + \lambda \lVert W - V \rVert^2`, with :math:`V = 0` in the columns
    that go. The ridge pulls towards the dense weights. With a bias, the mean of what is lost goes into it, and the
    weights fit the rest. It is solved exactly, by one factorisation in float64 of the columns that stay.

    Args:
        weight: ``[out, in]``.
        statistics: of its inputs: ``gram``, and ``input_mean`` for a bias.
        kept: bool ``[in]``, True = the column stays. In a grouped convolution, it is the same for all groups.
        bias: whether the layer has a bias, or may be given one.
        weights: whether the columns that stay may change. If not, only the bias makes up.
        damping: lambda as a fraction of the mean of the Gram matrix's diagonal (the centred one with a bias).

    Raises:
        PatternError: ``kept`` does not fit the weight.
        StatisticsError: a statistic is missing, or does not fit.
        SolverError: the Gram matrix is not positive definite even with damping 1.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import refit_columns
        >>> x = torch.tensor([[1.0, 3.0], [2.0, 5.0], [3.0, 7.0]])  # the second is twice the first, plus one
        >>> statistics = secateur.LayerStatistics(tokens=3, gram=x.T @ x, input_mean=x.mean(0))
        >>> weight, kept = torch.tensor([[1.0, 1.0]]), torch.tensor([True, False])
        >>> found = refit_columns(weight, statistics, kept, bias=True, damping=0.0)
        >>> found.weight.round(decimals=3).tolist(), round(float(found.bias_shift), 3)
        ([[3.0, 0.0]], 1.0)
    """
    number("damping", damping, 0)
    if kept.dtype != torch.bool or kept.shape != weight.shape[1:]:
        raise PatternError(
            f"kept must be bool [{weight.shape[1]}], one for each column, got {kept.dtype} {list(kept.shape)}."
        )
    kept = kept.to(weight.device)
    dense = weight.detach().double()
    gram = gram_for(dense, statistics)
    assert statistics is not None
    mean = features_for(dense, statistics, "input_mean") if bias else dense.new_zeros(gram.shape[:2])
    solved, shifts = torch.zeros_like(dense), dense.new_zeros(len(dense))
    before = after = energy = 0.0
    for group, rows in enumerate(torch.arange(len(dense)).chunk(len(gram))):
        part, h = dense[rows], gram[group]
        energy += _energy(part, h)
        before += _energy(part[:, ~kept], h[~kept][:, ~kept])
        if bias:
            h = h.addr(mean[group], mean[group], alpha=-statistics.tokens)
        new = part * kept
        if weights and kept.any():
            new[:, kept] += _takes_over(part, h, kept, damping)
        new = new.to(weight.dtype).double()
        solved[rows], shifts[rows] = new, (part - new) @ mean[group]
        after += _energy(part - new, h)
    return Refitted(solved.to(weight.dtype), shifts.to(weight.dtype) if bias else None, before, max(0.0, after), energy)


def _takes_over(weight: Tensor, gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """``W_R H_RK H_KK^-1``: what the columns that stay gain, ``[out, kept]``."""
    lost = weight[:, ~kept] @ gram[~kept][:, kept]
    diagonal = gram.diagonal()
    inner = gram[kept][:, kept]
    # The ridge is a fraction of the mean over all inputs, as it is wherever the whole matrix is damped.
    scale = float(diagonal.mean() / inner.diagonal().mean()) if float(inner.diagonal().mean()) > 0 else 1.0
    factor, _ = lower_factor(inner.unsqueeze(0), damping * scale)
    return torch.cholesky_solve(lost.T, factor[0]).T


def _energy(weight: Tensor, gram: Tensor) -> float:
    """``tr(W H W^T)``."""
    return float(((weight @ gram) * weight).sum())
