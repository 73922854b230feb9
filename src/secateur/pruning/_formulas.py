"""The published formulas for the sparsity of each layer, as functions of numbers that were measured layer by layer.

Each formula is a family of shares that grow with one number. That number is found so that the total is the budget, with
every share within its bounds: so no share is below 0 or above 1, and means are weighted by the weights of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._types import Scores, Weight
from secateur.patterns import SparsityPattern
from secateur.pruning._counts import Shares, meet

OUTLIER = 5.0  # times the mean; OWL's M
OWL_RANGE = 0.08  # how far OWL's shares lie from the mean, at most; its lambda
ALPHA_RANGE = 0.3  # the same of AlphaPruning, in multiples of the mean; its epsilon
_POINTS = 1025  # of the distribution of a layer's scores

Distribution = NDArray[np.float64]  # logarithms of scores in ascending order, at equal distances


def erk_shares(
    sides: Sequence[Sequence[int]], sizes: Sequence[int], budget: float, bounds: tuple[float, float]
) -> Shares:
    r"""Erdos-Renyi-Kernel: densities in proportion to :math:`(\sum_d n_d) / \prod_d n_d`.

    Args:
        sides: sizes :math:`n_d` of each layer's dimensions, such as out, in, and height and width of a kernel.
        sizes, budget, bounds: see :func:`secateur.pruning._counts.meet`.

    Reference:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, arXiv:1911.11134.
    """
    density = np.array([sum(dims) / max(1.0, float(np.prod(dims, dtype=np.float64))) for dims in sides])
    return meet(lambda number: 1 - np.exp(-number) * density, sizes, budget, bounds)


def threshold_shares(
    distributions: Sequence[Distribution], sizes: Sequence[int], budget: float, bounds: tuple[float, float]
) -> Shares:
    """Prune all units below one threshold, the same for all layers.

    Args:
        distributions: of the scores of each layer.
        sizes, budget, bounds: see :func:`secateur.pruning._counts.meet`.
    """

    def below(threshold: float) -> Shares:
        return np.array([_part_below(threshold, values) for values in distributions])

    return meet(below, sizes, budget, bounds)


def saliency_costs(pattern: SparsityPattern, scores: Scores) -> Distribution:
    r"""Return the distribution of :math:`u_i / \sum_j u_j`, where :math:`u_i` is the sum of a unit's squared scores.

    Squared Wanda scores are what pruning costs in squared error of the output, if inputs are uncorrelated, and their
    sum is the squared output. So this scale is the relative squared error of the layer's output, and one threshold over
    all layers makes the sum of these errors least.

    Args:
        pattern: whose units count.
        scores: ``[out, in]``.
    """
    squares = _squares(pattern, scores)
    return _distribution(squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny))


def lamp_costs(pattern: SparsityPattern, weight: Weight) -> Distribution:
    r"""Return the distribution of LAMP's :math:`w_i^2 / \sum_{j: |w_j| \ge |w_i|} w_j^2`.

    Reference:
        Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning", 2021, arXiv:2010.07611.

    Args:
        pattern: whose units count; a unit of several weights has the sum of their squares.
        weight: ``[out, in]``.
    """
    squares = _squares(pattern, weight).sort().values
    left = squares.flip(0).cumsum(0).flip(0)
    return _distribution(squares / left.clamp_min(torch.finfo(squares.dtype).tiny), is_sorted=True)


def outliers(scores: Sequence[Scores]) -> float:
    """Return how much of a block's scores is above OUTLIER times their mean.

    Args:
        scores: of the layers of the block, each ``[out, in]``.
    """
    number = sum(part.numel() for part in scores)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / max(number, 1)
    return sum(int((part > OUTLIER * mean).sum()) for part in scores) / max(number, 1)


def owl_shares(outlying: Sequence[float], sizes: Sequence[int], budget: float, bounds: tuple[float, float]) -> Shares:
    r"""Outlier-weighed layers: a share is the mean less :math:`2 \lambda` times the scaled part of outliers.

    Differs from the paper's code: the mean is weighted by weights, shares stay within bounds, and blocks that all have
    the same part of outliers get equal shares, where the code divides by zero.

    Args:
        outlying: the part of outliers in the block of each layer.
        sizes, budget, bounds: see :func:`secateur.pruning._counts.meet`.

    Reference:
        Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
        Sparsity", 2023, arXiv:2310.05175.
    """
    offsets = 2 * OWL_RANGE * _scaled(outlying, 0.0)
    return meet(lambda number: number - offsets, sizes, budget, bounds)


def hill_exponent(weight: Weight) -> float | None:
    r"""Return :math:`1 + k / \sum_{i > n - k} \ln(\lambda_i / \lambda_{n-k})` of the eigenvalues of ``W W^T``.

    With k = n / 2. Eigenvalues that are rounding errors do not count. A small exponent means a heavy tail.

    Args:
        weight: ``[out, in]``.

    Returns:
        The exponent; None for a matrix with fewer than three eigenvalues, or with ones that are equal up to rounding.
    """
    wide = weight.detach().double()
    values = torch.linalg.eigvalsh(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide)
    if not len(values) or float(values[-1]) <= 0:
        return None
    values = values[values > values[-1] * len(values) * torch.finfo(torch.float64).eps]
    tail = len(values) // 2
    if tail < 1 or len(values) < 3:
        return None
    spread = float((values[-tail:] / values[-tail - 1]).log().sum())
    # The eigenvalues of an orthogonal matrix differ by some four roundings of its weights.
    rounding = max(torch.finfo(weight.dtype).eps, _LEAST_ROUNDING)
    return 1 + tail / spread if spread > 16 * rounding * tail else None


_LEAST_ROUNDING = 1e-12  # of eigenvalues that are computed in float64


def alpha_shares(
    exponents: Sequence[float | None],
    blocks: Sequence[str],
    sizes: Sequence[int],
    budget: float,
    bounds: tuple[float, float],
) -> Shares:
    r"""AlphaPruning: shares in proportion to :math:`1 - \epsilon + 2 \epsilon` times the block's scaled exponent.

    A block with a heavy tail, a small exponent, is taken to be well trained and loses less. Differs from the paper's
    code: means are weighted by weights, shares stay within bounds, and blocks with equal exponents get equal shares,
    where the code divides by zero.

    Args:
        exponents: of each layer; None counts as the mean of all.
        blocks: the name of each layer's block, over which exponents are averaged; a layer without one is its own.
        sizes, budget, bounds: see :func:`secateur.pruning._counts.meet`.

    Reference:
        Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
        Language Models", 2024, arXiv:2410.10912.
    """
    known = [(exponent, size) for exponent, size in zip(exponents, sizes, strict=True) if exponent is not None]
    total = sum(size for _, size in known)
    mean = sum(exponent * size for exponent, size in known) / total if total else 1.0
    filled = [mean if exponent is None else exponent for exponent in exponents]
    keys = [block or f"{number}" for number, block in enumerate(blocks)]
    sums: dict[str, tuple[float, int]] = {}
    for key, exponent, size in zip(keys, filled, sizes, strict=True):
        before = sums.get(key, (0.0, 0))
        sums[key] = before[0] + exponent * size, before[1] + size
    averages = [sums[key][0] / max(sums[key][1], 1) for key in keys]
    factors = 1 - ALPHA_RANGE + 2 * ALPHA_RANGE * _scaled(averages, 0.5)
    return meet(lambda number: np.exp(number) * factors, sizes, budget, bounds)


def _scaled(values: Sequence[float], equal: float) -> Shares:
    """Values moved and stretched to [0, 1]; if they are all equal, what is given for that."""
    found = np.asarray(values, np.float64)
    low, high = float(found.min()), float(found.max())
    return (found - low) / (high - low) if high > low else np.full(len(found), equal)


def _squares(pattern: SparsityPattern, scores: Tensor) -> Tensor:
    """The sum of squares of each unit, in float64."""
    units = pattern.units(scores.shape)
    found = units.scores(scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).abs()).flatten().double()
    return found.square() if units.size == 1 else found


def _distribution(values: Tensor, is_sorted: bool = False) -> Distribution:
    if not values.numel():
        return np.zeros(1)
    ordered = values if is_sorted else values.sort().values
    places = torch.linspace(0, len(ordered) - 1, _POINTS, dtype=torch.float64).round().long().to(ordered.device)
    chosen = ordered[places].cpu().numpy()
    logs: Distribution = np.log(np.maximum(chosen, np.exp(-_LEAST)))
    return logs


_LEAST = 59.0  # a score of e^-59 or less counts as none: within the numbers that are tried


def _part_below(threshold: float, values: Distribution) -> float:
    """How much of a distribution lies below a value."""
    if threshold < values[0]:
        return 0.0
    if threshold >= values[-1]:
        return 1.0
    return float(np.interp(threshold, values, np.linspace(0, 1, len(values))))
