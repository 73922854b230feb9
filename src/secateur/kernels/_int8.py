"""Products in 8 bits: weights that are bytes, and inputs that are rounded to bytes at each call (W8A8).

Weights are codes from -127 to 127 with one scale for each output row. Each input row has a scale and a zero point of
its own. Sums of products are whole numbers. So every kernel has the same result, to the bit where there is no bias.
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
from secateur.formats import Format
from secateur.kernels._layout import Layout, prepare
from secateur.kernels._route import LayoutRoute
from secateur.patterns import SparsityPattern

MOST_COLUMNS = 65536  # with more, the sum of products of bytes would not fit 32 bits
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def round_inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of an input as bytes, so that ``x`` is about ``scale * (bytes - zero)``.

    Args:
        x: ``[rows, in]`` float32.

    Returns:
        Bytes uint8 ``[rows, in]``, scales float32 ``[rows]``, and zero points int32 ``[rows]``. A row with an infinity
        or NaN has the scale NaN, and only zeros.
    """
    low, high = (x.new_zeros(len(x)),) * 2
    if x.shape[1]:
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    wrong = ~x.isfinite().all(1)
    scale = (high / 255 - low / 255).clamp(min=_LEAST_SCALE).masked_fill(wrong, torch.nan)
    inverse = (1 / scale).masked_fill(wrong, 0)
    zero = (-low.masked_fill(wrong, 0) * inverse).round().clamp(max=255)
    finite = x.masked_fill(wrong[:, None], 0)
    codes = ((finite * inverse[:, None]).round() + zero[:, None]).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.int32)


def round_weight(weight: Weight, mask: Mask | None) -> tuple[Tensor, Mask, Tensor]:
    """Return a weight ``[out, in]`` as codes int8, zero where the mask prunes; the mask; and the scale of each row.

    Raises:
        KernelError: more columns than sums in 32 bits allow.
        PatternError, FormatError, TypeError: as :func:`~secateur.kernels._layout.prepare`.
    """
    codes, mask, scale = prepare(weight, mask, torch.int8)
    assert scale is not None
    check_columns(codes.shape[1])
    return codes, mask, scale


def check_columns(columns: int) -> None:
    """Raise if a weight has more columns than sums in 32 bits allow."""
    if columns > MOST_COLUMNS:
        raise KernelError(
            f"a weight of {columns:,} inputs cannot be multiplied in 8 bits; sums of 32 bits hold products of up to "
            f'{MOST_COLUMNS:,}. Pack this layer with precision="exact".'
        )


@dataclass(frozen=True, eq=False)
class Int8Layout(Layout):
    """A layout of codes, whose inputs are rounded to bytes."""

    sums: Tensor  # [out] int32, the sum of the codes of each row

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b as the kernel does, slowly."""
        assert self.scale is not None
        codes, scale, zero = round_inputs(x.float())
        # Whole numbers below 2^53, which float64 has all of.
        weight = (self.to_dense().double() / self.scale.double()[:, None]).round().to(x.device)
        whole = (codes.double() - zero[:, None]) @ weight.T
        y = whole.float() * (scale[:, None] * self.scale.to(x.device))
        return y if bias is None else y + bias.float()


class Int8Route(LayoutRoute):
    """A route in 8 bits."""

    precision: ClassVar[str] = "int8"

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight, whose rows are rounded to codes."""
        codes, mask, scale = round_weight(values, mask)
        return self.lay_out_codes(codes, scale, mask)

    @abstractmethod
    def lay_out_codes(self, codes: Tensor, scale: Tensor, mask: Mask) -> Int8Layout:
        """Return the layout of a weight.

        Args:
            codes: int8 ``[out, in]``, from -127 to 127.
            scale: float32 ``[out]``.
            mask: ``[out, in]`` bool, which codes the format stores.
        """

    @classmethod
    @abstractmethod
    def fits(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Return the candidates for a weight whose sums fit 32 bits."""

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """None for a weight with too many columns."""
        return cls.fits(packed, patterns, density) if packed.shape[1] <= MOST_COLUMNS else []
