"""Importances from the gradient of a loss. Higher = keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from secateur._errors import StatisticsError
from secateur._types import Scores, Weight
from secateur.calibration import LayerStatistics, Need
from secateur.solvers._importance import Importance


def _found(need: Need, weight: Weight, statistics: LayerStatistics | None) -> torch.Tensor:
    """A statistic of the shape of the weight, on its device."""
    if statistics is None:
        raise StatisticsError("it needs calibration inputs and a loss: pass batches and loss.")
    found = statistics.require(need)[0].to(weight.device)
    if found.shape != weight.shape:
        raise StatisticsError(f"{need} of shape {tuple(found.shape)} does not fit a weight {tuple(weight.shape)}.")
    return found


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64: a product of a weight and a gradient, and its square, are beyond float32 for many losses."""
    return tensor.detach().double()


@dataclass(frozen=True)
class Taylor(Importance):
    r"""``|w_ij * mean_b dL_b/dw_ij|``: how much removing a weight changes the loss, to first order.

    L_b is the loss of batch b, from the ``loss`` of :func:`prune_`. Compared within the layer. For a trained model the
    mean gradient is nearly zero, and its noise decides: use it where the loss is another one than in training, and
    :class:`Fisher` else.

    Differs from the paper: the gradient is averaged before its size is taken, so that what batches disagree on counts
    less. The paper's mean of squares over batches ranks single weights as :class:`Fisher` does. Tiles, rows and columns
    are scored by the sum of the squares of their weights' scores.

    Cost: see :class:`Fisher`.

    Example:
        >>> import torch, secateur
        >>> statistics = secateur.LayerStatistics(tokens=1, gradient=torch.tensor([[0.5, -0.1]]))
        >>> secateur.Taylor().scores(torch.tensor([[-2.0, 4.0]]), statistics).tolist()
        [[1.0, 0.4000000059604645]]

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771.
    """

    needs = frozenset({"gradient"})
    scope = "layer"

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        return (_exact(weight) * _exact(_found("gradient", weight, statistics))).abs()


@dataclass(frozen=True)
class Fisher(Importance):
    r"""The root of ``w_ij^2 * mean_b (dL_b/dw_ij)^2 / 2``: what removing a weight costs, to second order.

    At a minimum of the loss, the mean of squared gradients stands for the diagonal of its Hessian. L_b is the loss of
    batch b, from the ``loss`` of :func:`prune_`: squares are taken for each batch, not for each sample. Batches of one
    sample give the empirical Fisher information as the papers have it; larger ones average much of it away. Compared
    within the layer. The score is the root, because the sum of the squares of scores is that of a tile, row or column:
    so their scores are exactly the sums of costs.

    Cost: for each stage and batch, one forward pass of the whole model, and one backward pass down to the stage; the
    memory of one batch's activations from the stage on, and of the stage's gradients.

    Example:
        >>> import torch, secateur
        >>> statistics = secateur.LayerStatistics(tokens=1, gradient_squares=torch.tensor([[8.0, 2.0]]))
        >>> secateur.Fisher().scores(torch.tensor([[-1.0, 3.0]]), statistics).tolist()  # roots of 4 and of 9
        [[2.0, 3.0]]

    Reference:
        Theis et al., "Faster Gaze Prediction With Dense Networks and Fisher Pruning", 2018, arXiv:1801.05787; LeCun et
        al., "Optimal Brain Damage", 1989.
    """

    needs = frozenset({"gradient_squares"})
    scope = "layer"

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        return _exact(weight).abs() * (_exact(_found("gradient_squares", weight, statistics)) / 2).sqrt()


@dataclass(frozen=True)
class Movement(Importance):
    r"""``sqrt(S_ij - min S)`` with ``S_ij = -w_ij * mean_b dL_b/dw_ij``: keeps the weights that the loss wants larger.

    S is the change of the loss when the weight is removed, to first order, with its sign. One with S below 0 is a
    weight that gradient descent moves towards zero; it goes first, however large it is. L_b is the loss of batch b,
    from the ``loss`` of :func:`prune_`: that of the task that the model is to be good at. Compared within the layer.
    Weights of inputs that are never active have S = 0, and so stay longer than those below. The least S of the layer
    is taken off, and the root taken, because scores are not negative, and the sum of their squares is that of a tile,
    row or column: units of one size are ranked by their sums of S.

    Differs from the paper: it sums S over the steps of a fine-tuning, in which weights change. This is its first step
    alone, after which nothing makes up for the large weights that go. It can ruin a model: compare it with
    :class:`Wanda` before you use it.

    Cost: see :class:`Fisher`.

    Example:
        >>> import torch, secateur
        >>> statistics = secateur.LayerStatistics(tokens=1, gradient=torch.tensor([[1.0, -1.0, 0.0]]))
        >>> secateur.Movement().scores(torch.tensor([[2.0, 2.0, 9.0]]), statistics).tolist()  # S is -2, 2 and 0
        [[0.0, 2.0, 1.4142135623730951]]

    Reference:
        Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, arXiv:2005.07683.
    """

    needs = frozenset({"gradient"})
    scope = "layer"

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        change = -_exact(weight) * _exact(_found("gradient", weight, statistics))
        least = change.min() if change.numel() else math.inf
        return (change - least).sqrt()
