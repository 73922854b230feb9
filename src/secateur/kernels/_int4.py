"""Products of weights of 4 bits and inputs that are rounded to bytes at each call.

Weights are codes from -7 to 7 with a scale for each output row and group of 64 columns. The sum of products of each
group is a whole number; times the scales these are added up in float32, so that kernels agree to the last bits only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import GRIDS, INT4, DensePacked, Format, check_mask, check_weight, encode, value_name
from secateur.kernels._int8 import MOST_COLUMNS, round_inputs
from secateur.kernels._layout import Layout
from secateur.kernels._route import LayoutRoute
from secateur.patterns import SparsityPattern

_GRID = GRIDS["int4"]


def round_groups(weight: Weight, mask: Mask | None) -> tuple[Tensor, Tensor, Mask]:
    """Return a weight ``[out, in]`` as codes int8, zero where the mask prunes; the scales of groups; and the mask.

    Raises:
        PatternError, FormatError, TypeError: a weight or a mask that cannot be packed.
    """
    check_weight(weight)
    weight = weight.detach().cpu()
    mask = weight != 0 if mask is None else check_mask(mask, weight).detach().cpu()
    codes, scales = encode(torch.where(mask, weight, 0), INT4)
    assert scales is not None
    return codes, scales, mask


def weight_sums(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the sum of the weights of each row, float32 ``[out]``."""
    return (codes.double() * _GRID.spread(scales, codes.shape[1])).sum(1).float()


@dataclass(frozen=True, eq=False)
class Int4Layout(Layout):
    """A layout of codes of 4 bits, whose inputs are rounded to bytes."""

    sums: Tensor  # [out] float32, the sum of the weights of each row

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b as the kernel does, slowly."""
        codes, scale, zero = round_inputs(x.float())
        whole = codes.double() - zero[:, None]
        y = (whole @ self.to_dense().double().to(x.device).T).float() * scale[:, None]
        return y if bias is None else y + bias.float()


class Int4Route(LayoutRoute):
    """A route of weights that are stored in 4 bits. Their codes are not rounded again."""

    precision: ClassVar[str] = "int8"

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Refuse values that are not codes."""
        raise KernelError(f"the route {self} runs int4 values only. Pack the layer with value_dtype='int4'.")

    @abstractmethod
    def lay_out_groups(self, codes: Tensor, scales: Tensor, mask: Mask) -> Int4Layout:
        """Return the layout of a weight.

        Args:
            codes: int8 ``[out, in]``, from -7 to 7 (or -8), zero where the mask is False.
            scales: float16 ``[out, groups]``.
            mask: ``[out, in]`` bool, which codes the format stores.
        """

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One, for weights that are stored in 4 bits and whose zeros the layout leaves out, if it leaves out any."""
        whole = isinstance(packed, DensePacked) and cls.stores_zeros
        return [] if whole or cls().why_not(packed) is not None else [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Only int4 values fit, of not too many columns."""
        if packed.value_dtype != INT4:
            return f"its values are {value_name(packed.value_dtype)}, not int4"
        return None if packed.shape[1] <= MOST_COLUMNS else f"it has more than {MOST_COLUMNS:,} inputs"
