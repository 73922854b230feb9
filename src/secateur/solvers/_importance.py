"""Importances: how much each weight matters, as a score. Higher = keep."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur._checks import integer, number
from secateur._errors import StatisticsError
from secateur._types import Scores, Weight
from secateur.calibration import LayerStatistics, Need
from secateur.patterns import Scope


class Importance(ABC):
    """Scores the weights of one layer.

    ``needs`` names the statistics that ``scores`` reads, ``scope`` what an ``Unstructured()`` pattern compares when it
    does not say itself.
    """

    needs: ClassVar[frozenset[Need]]
    scope: ClassVar[Scope]

    @abstractmethod
    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        """Return finite, non-negative scores of the weight's shape, in float32 or better.

        Args:
            weight: ``[out, in]``.
            statistics: the layer's calibration statistics; may be None for an importance that needs none.

        Raises:
            StatisticsError: a statistic in ``needs`` is missing or does not fit the weight.
        """


def _wide(weight: Weight) -> Weight:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _norm_per_weight(weight: Weight, statistics: LayerStatistics | None) -> torch.Tensor:
    """The input norms, ``[1 or out, in]``, each row with those of its own group."""
    if statistics is None:
        raise StatisticsError("it needs calibration inputs: pass batches.")
    norm = statistics.require("input_norm").to(weight.device)
    if norm.shape[1] != weight.shape[1] or weight.shape[0] % norm.shape[0]:
        raise StatisticsError(f"input_norm of shape {tuple(norm.shape)} does not fit a weight {tuple(weight.shape)}.")
    return norm if len(norm) == 1 else norm.repeat_interleave(weight.shape[0] // norm.shape[0], dim=0)


@dataclass(frozen=True)
class Magnitude(Importance):
    """``|w_ij|``: no data, compared within the layer.

    Example:
        >>> import torch, secateur
        >>> secateur.Magnitude().scores(torch.tensor([[-2.0, 1.0]]), None).tolist()
        [[2.0, 1.0]]

    Reference:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv:1506.02626.
    """

    needs = frozenset()
    scope = "layer"

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        return _wide(weight).abs()


@dataclass(frozen=True)
class Wanda(Importance):
    """``|w_ij| * ||x_j||``: magnitude times the L2 norm of the input that it multiplies, compared within a row.

    Its square is exactly what dropping the weight costs in squared output error when inputs are uncorrelated.

    Example:
        >>> import torch, secateur
        >>> statistics = secateur.LayerStatistics(tokens=1, input_norm=torch.tensor([2.0, 1.0]))
        >>> secateur.Wanda().scores(torch.tensor([[1.0, 3.0]]), statistics).tolist()
        [[2.0, 3.0]]

    Reference:
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695.
    """

    needs = frozenset({"input_norm"})
    scope = "row"

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        return _wide(weight).abs() * _norm_per_weight(weight, statistics)


@dataclass(frozen=True)
class RIA(Importance):
    """``(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j|| ** exponent``: relative importance and activations.

    A weight counts by its share of its input's and of its output's total magnitude, so that no channel is pruned away
    whole. Compared within a row.

    Differs from the paper: its code compares within the layer by default; the row is what its N:M results use, and what
    ``Unstructured("layer")`` overrides.

    Args:
        exponent: power of the input norm; the paper's a.

    Raises:
        RecipeError: the exponent is NaN.

    Example:
        >>> import torch, secateur
        >>> statistics = secateur.LayerStatistics(tokens=1, input_norm=torch.tensor([1.0, 4.0]))
        >>> secateur.RIA().scores(torch.tensor([[1.0, 3.0]]), statistics).tolist()  # (1 + 1/4) * 1, (1 + 3/4) * 2
        [[1.25, 3.5]]

    Reference:
        Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
    """

    exponent: float = 0.5
    needs = frozenset({"input_norm"})
    scope = "row"

    def __post_init__(self) -> None:
        number("exponent", self.exponent)

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        norm = _norm_per_weight(weight, statistics)
        groups = 1 if statistics is None else len(statistics.require("input_norm"))
        # A column of one group of a grouped convolution reads another input than the same column of the next.
        size = _wide(weight).abs().reshape(groups, weight.shape[0] // groups, weight.shape[1])
        tiny = torch.finfo(size.dtype).tiny  # an all-zero row or column has shares of 0, not 0/0
        shares = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(2, keepdim=True).clamp_min(tiny)
        shares = shares.view_as(weight)
        # 0 ** 0 is 1, which would let exponent=0 ignore that an input is dead
        return shares * torch.where(norm > 0, norm**self.exponent, 0.0)


@dataclass(frozen=True)
class Random(Importance):
    """Uniform noise in [0, 1): the baseline that every other importance must beat.

    The same seed gives the same scores for the same weight on every run and device, and different ones for different
    weights.

    Args:
        seed: of the generator, any int.

    Example:
        >>> import torch, secateur
        >>> weight = torch.ones(2, 2)
        >>> bool((secateur.Random(0).scores(weight, None) == secateur.Random(0).scores(weight, None)).all())
        True
    """

    seed: int = 0
    needs = frozenset()
    scope = "layer"

    def __post_init__(self) -> None:
        integer("seed", self.seed)

    def scores(self, weight: Weight, statistics: LayerStatistics | None) -> Scores:
        # Mixing in the weight keeps equally shaped layers from sharing one mask without threading a name through.
        content = weight.detach().float().cpu().contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, zlib.crc32(str(self.seed).encode())))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


# An importance's name means Select(importance) where a method is named.
IMPORTANCES: dict[str, type[Importance]] = {"magnitude": Magnitude, "wanda": Wanda, "ria": RIA, "random": Random}
