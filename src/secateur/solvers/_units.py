"""Importances of units: how much it matters that columns of a weight stay together. Higher = keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur._checks import number
from secateur._errors import PatternError, StatisticsError
from secateur._types import Weight
from secateur.calibration import LayerStatistics, Need
from secateur.layers import Layer
from secateur.solvers._gram import gram_for, inverse


class UnitImportance(ABC):
    """Scores units of one weight. A unit is a set of columns, such as the outputs of an attention head.

    The score is a squared error, or an estimate of one, so that a unit that several layers read has the sum of the
    scores in all of them. ``needs`` names the statistics that ``scores`` reads.
    """

    needs: ClassVar[frozenset[Need]]

    @abstractmethod
    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        """Return a finite, non-negative score for each unit, float64 ``[units]``.

        Args:
            weight: ``[out, in]``, of the layer that reads the units. In a grouped convolution, a unit is the same
                columns of all groups.
            statistics: the layer's calibration statistics; may be None for an importance that needs none.
            units: int64 ``[units, width]``: the columns of each unit.

        Raises:
            StatisticsError: a statistic in ``needs`` is missing or does not fit the weight.
            PatternError: units that are not columns of the weight, or that overlap.
        """


def checked_units(units: object, columns: int) -> Tensor:
    """Return units as an int64 tensor ``[units, width]`` on the CPU, if they are columns, each in one unit at most.

    Raises:
        PatternError: they are not.
    """
    found = torch.as_tensor(units).cpu()
    if found.ndim != 2 or found.is_floating_point() or found.dtype == torch.bool or not found.numel():
        raise PatternError(f"units must be integers [units, width], got {found.dtype} of shape {tuple(found.shape)}.")
    found = found.long()
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= columns:
        raise PatternError(f"units must be columns of a weight with {columns}, got numbers from {least} to {most}.")
    if len(found.unique()) != found.numel():
        raise PatternError(f"units must not overlap, but {found.numel() - len(found.unique())} columns are in several.")
    return found


def columns_of(layer: Layer, dim: int, units: object) -> Tensor:
    """Return the columns of a layer's matrix that read some units, int64 ``[units, width]``, on the CPU.

    Args:
        layer: any, whose matrix may be a transposed or flattened parameter, or a part of one.
        dim: of the layer's parameter.
        units: ``[units, width]``: the indices of each unit along that dimension.

    Raises:
        PatternError: they are not whole columns, or not the same ones in all groups of a convolution.

    Example:
        >>> import torch
        >>> from secateur.layers import select_layers
        >>> from secateur.solvers import columns_of
        >>> layers, _ = select_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 4, (1, 2))))
        >>> columns_of(layers[0], 1, [[0], [2]]).tolist()  # of three input channels, with two kernel positions each
        [[0, 1], [4, 5]]
    """
    shape = layer.parameter.shape
    units = checked_units(units, shape[dim])
    owner = torch.full((shape[dim],), -1)
    owner[units] = torch.arange(len(units)).unsqueeze(1)
    view = [-1 if axis == dim % len(shape) else 1 for axis in range(len(shape))]
    owners = layer.to_matrix(owner.view(view).expand(shape))
    counts = owners[0][owners[0] >= 0].bincount(minlength=len(units))
    if not (owners == owners[0]).all() or len(counts.unique()) != 1 or not counts[0]:
        raise PatternError(
            f"{layer.title}: indices along dimension {dim} of its parameter {tuple(shape)} are not the same columns of "
            f"all rows of its matrix {tuple(owners.shape)}."
        )
    return owners[0].argsort(stable=True)[-int(counts.sum()) :].view(len(units), -1)


def needed(statistics: LayerStatistics | None) -> LayerStatistics:
    """Return the statistics if there are any.

    Raises:
        StatisticsError: there are none.
    """
    if statistics is None:
        raise StatisticsError("it needs calibration inputs: pass batches.")
    return statistics


def features_for(weight: Weight, statistics: LayerStatistics | None, need: Need) -> Tensor:
    """The statistic of each input feature as float64 ``[groups, in]`` on the weight's device, checked to fit."""
    found = needed(statistics).require(need).to(weight.device, torch.float64)
    if found.shape[1] != weight.shape[1] or weight.shape[0] % found.shape[0]:
        raise StatisticsError(f"{need} of shape {tuple(found.shape)} does not fit a weight {tuple(weight.shape)}.")
    return found


def _column_energy(weight: Weight, groups: int = 1) -> Tensor:
    """The squared norm of each column, float64 ``[groups, in]``."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().unflatten(0, (groups, -1)), dim=1, dtype=torch.float64)
    return norms.square()


def _summed(columns: Tensor, units: Tensor) -> Tensor:
    """The sum over groups, ``[groups, in]``, and over the columns of each unit."""
    units = checked_units(units, columns.shape[1]).to(columns.device)
    return columns.sum(0)[units].sum(1)


def costs_of(inverse_blocks: Tensor, product_blocks: Tensor) -> Tensor:
    """``tr([(H^-1)_SS]^-1 W_S^T W_S)`` for each unit S, from ``[units, width, width]`` of both matrices.

    A unit that was removed already has blocks of zeros, up to rounding. Its cost has no meaning, but does no harm.
    """
    if inverse_blocks.shape[1] == 1:
        return (product_blocks / inverse_blocks).flatten()
    factor, failed = torch.linalg.cholesky_ex(inverse_blocks)
    factor[failed != 0] = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    solved: Tensor = torch.cholesky_solve(product_blocks, factor)
    return solved.diagonal(dim1=1, dim2=2).sum(1)


@dataclass(frozen=True)
class UnitMagnitude(UnitImportance):
    r"""``sum_j ||W_j||^2``: the squared norm of a unit's columns. No data.

    Example:
        >>> import torch
        >>> from secateur.solvers import UnitMagnitude
        >>> UnitMagnitude().scores(torch.tensor([[1.0, 2.0, 3.0]]), None, torch.tensor([[0, 1], [2, 2]])[:1]).tolist()
        [5.0]

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", 2016, arXiv:1608.08710.
    """

    needs = frozenset()

    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        return _summed(_column_energy(weight), units)


@dataclass(frozen=True)
class UnitWanda(UnitImportance):
    r"""``sum_j ||x_j||^2 ||W_j||^2``: what removing a unit costs in squared output error, if inputs are uncorrelated.

    Differs from the paper: norms are squared, so that the sum over columns is an error.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import UnitWanda
        >>> statistics = secateur.LayerStatistics(tokens=1, input_norm=torch.tensor([2.0, 1.0]))
        >>> UnitWanda().scores(torch.tensor([[1.0, 3.0]]), statistics, torch.tensor([[0], [1]])).tolist()
        [4.0, 9.0]

    Reference:
        An et al., "FASP: Fast and Accurate Structured Pruning of Large Language Models", 2025, arXiv:2501.09412.
    """

    needs = frozenset({"input_norm"})

    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        norm = features_for(weight, statistics, "input_norm")
        return _summed(norm.square() * _column_energy(weight, len(norm)), units)


@dataclass(frozen=True)
class UnitFLAP(UnitImportance):
    r"""``sum_j T Var(x_j) ||W_j||^2``: what removing a unit costs if its mean is added to the bias.

    A unit that gives out nearly the same for every token can be replaced by a constant, however large it is.

    Differs from the paper: the variance is summed over all T tokens, so that scores are comparable with those of the
    other importances, and scores are not standardised in each layer.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import UnitFLAP
        >>> x = torch.tensor([[1.0, 5.0], [-1.0, 5.0]])
        >>> statistics = secateur.LayerStatistics(tokens=2, input_norm=x.norm(dim=0), input_mean=x.mean(0))
        >>> [round(score, 3) for score in UnitFLAP().scores(torch.ones(1, 2), statistics, [[0], [1]]).tolist()]
        [2.0, 0.0]

    Reference:
        An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, arXiv:2312.11983.
    """

    needs = frozenset({"input_norm", "input_mean"})

    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        norm, mean = (features_for(weight, statistics, need) for need in ("input_norm", "input_mean"))
        squares = norm.square()
        spread = squares - needed(statistics).tokens * mean.square()
        # The norm is rounded to float32: below its last digits a variance is none.
        spread = torch.where(spread > 4 * torch.finfo(torch.float32).eps * squares, spread, 0.0)
        return _summed(spread * _column_energy(weight, len(norm)), units)


@dataclass(frozen=True)
class UnitOBS(UnitImportance):
    r"""``tr(W_S [(H^-1)_SS]^-1 W_S^T)``: the error that is left when all other columns take over from a unit S.

    H is the damped Gram matrix of the inputs. The score is exact for removing one unit alone. Correlated units can each
    be replaced by the others, but not all of them: :func:`remove_columns` removes one after the other.

    Cost: one inverse of ``[in, in]`` in float64.

    Args:
        damping: added to the diagonal of the Gram matrix, as a fraction of its mean.

    Raises:
        RecipeError: damping below 0.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import UnitOBS
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.01, 0.0]])
        >>> statistics = secateur.LayerStatistics(tokens=3, gram=x.T @ x)
        >>> scores = UnitOBS(damping=0.0).scores(torch.ones(1, 3), statistics, torch.tensor([[0], [1], [2]]))
        >>> [round(score, 3) for score in scores.tolist()]  # the first two replace each other
        [0.0, 0.0, 1.0]

    Reference:
        Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv:2302.04089.
    """

    damping: float = 0.01
    needs = frozenset({"gram"})

    def __post_init__(self) -> None:
        number("damping", self.damping, 0)

    @torch.no_grad()
    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        weight = weight.detach().double()
        units = checked_units(units, weight.shape[1]).to(weight.device)
        gram = gram_for(weight, statistics)
        total = torch.zeros(len(units), dtype=torch.float64, device=weight.device)
        for part, h in zip(weight.chunk(len(gram)), gram, strict=True):
            columns = (part * (h.diagonal() != 0))[:, units]  # [out, units, width]; a dead input costs nothing
            products = torch.einsum("onw,onv->nwv", columns, columns)
            total += costs_of(inverse(h, self.damping)[units.unsqueeze(2), units.unsqueeze(1)], products)
        return total


@dataclass(frozen=True)
class _FromLoss(UnitImportance):
    needs = frozenset({"input_gradients"})

    def _by_batch(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        """The derivative of the loss by a factor on each unit, float64 ``[batches, units]``."""
        found = needed(statistics).require("input_gradients").double().to(weight.device)
        if found.shape[2] != weight.shape[1]:
            raise StatisticsError(
                f"input_gradients of shape {tuple(found.shape)} do not fit a weight {tuple(weight.shape)}."
            )
        units = checked_units(units, weight.shape[1]).to(weight.device)
        return found.sum(0)[:, units].sum(2)


@dataclass(frozen=True)
class UnitTaylor(_FromLoss):
    r"""``|sum_b dL_b / dm|``: how much the loss changes when a factor m on the unit moves from one, to first order.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import UnitTaylor
        >>> statistics = secateur.LayerStatistics(tokens=2, input_gradients=torch.tensor([[1.0, 3.0], [-1.0, 2.0]]))
        >>> UnitTaylor().scores(torch.ones(1, 2), statistics, torch.tensor([[0], [1]])).tolist()
        [0.0, 5.0]

    Reference:
        Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650; Molchanov et al.,
        "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771.
    """

    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        return self._by_batch(weight, statistics, units).sum(0).abs()


@dataclass(frozen=True)
class UnitFisher(_FromLoss):
    r"""``sum_b (dL_b / dm)^2``: the diagonal of the Fisher information of a factor m on the unit.

    Squares are taken for each batch: batches of one sample give the diagonal as the paper has it, larger ones less of
    it.

    Example:
        >>> import torch, secateur
        >>> from secateur.solvers import UnitFisher
        >>> statistics = secateur.LayerStatistics(tokens=2, input_gradients=torch.tensor([[1.0, 3.0], [-1.0, 2.0]]))
        >>> UnitFisher().scores(torch.ones(1, 2), statistics, torch.tensor([[0], [1]])).tolist()
        [2.0, 13.0]

    Reference:
        Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022, arXiv:2204.09656.
    """

    def scores(self, weight: Weight, statistics: LayerStatistics | None, units: Tensor) -> Tensor:
        return self._by_batch(weight, statistics, units).square().sum(0)


UNIT_IMPORTANCES: dict[str, type[UnitImportance]] = {
    "obs": UnitOBS,
    "flap": UnitFLAP,
    "wanda": UnitWanda,
    "magnitude": UnitMagnitude,
    "taylor": UnitTaylor,
    "fisher": UnitFisher,
}
