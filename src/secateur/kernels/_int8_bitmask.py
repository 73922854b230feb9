"""The layout of rows of kept codes of 8 bits, with one bit for each column, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import ColumnPacked, DensePacked, Format, RowPacked
from secateur.kernels._int8 import MOST_COLUMNS, Int8Layout, Int8Route, check_columns, round_weight
from secateur.kernels._layout import SPARE_BYTES, bits_of, entries, in_large_pages, kept_of, offsets_of, shape_of
from secateur.patterns import SparsityPattern


@dataclass(frozen=True, eq=False)
class Int8BitmaskLayout(Int8Layout):
    """Rows of kept codes, with one bit for each column: for a few input rows, where memory takes the time."""

    mask: Tensor  # [out, ceil(in / 64)] int64, lowest bit first
    offsets: Tensor  # [out + 1] int64
    kernel = "int8_bitmask"

    @classmethod
    def pack(cls, weight: Weight, mask: Mask | None = None) -> Int8BitmaskLayout:
        """Pack the weights ``[out, in]`` that a mask keeps; without a mask, those that are not zero.

        Raises:
            KernelError: more than 65,536 columns.
        """
        codes, mask, scale = round_weight(weight, mask)
        return cls.of(codes, scale, mask)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, mask: Mask) -> Int8BitmaskLayout:
        """Return the layout of codes int8 ``[out, in]``, zero where the mask prunes, with a scale for each row."""
        check_columns(codes.shape[1])
        sums = codes.sum(1, dtype=torch.int32)
        kept, _ = entries(codes, mask)
        values = in_large_pages(kept, SPARE_BYTES)
        return cls(shape_of(codes), values, scale.float(), sums, bits_of(mask), offsets_of(mask.sum(1)))

    def to_dense(self) -> Weight:
        weight = self.values.new_zeros(self.shape)
        weight[kept_of(self.mask, self.shape[1])] = self.values[:-SPARE_BYTES]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        return self.mask.data_ptr(), self.offsets.data_ptr(), self.sums.data_ptr()


@dataclass(frozen=True)
class Int8BitmaskRoute(Int8Route):
    """Run :class:`Int8BitmaskLayout`."""

    name: ClassVar[str] = "int8-bitmask"
    stores_zeros: ClassVar[bool] = True  # so that the values of a Bitmask are its values, and share their memory

    @classmethod
    def fits(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One, for weights whose zeros may be anywhere."""
        return [] if isinstance(packed, RowPacked | ColumnPacked | DensePacked) else [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits whose sums fit 32 bits."""
        return None if packed.shape[1] <= MOST_COLUMNS else f"it has more than {MOST_COLUMNS:,} inputs"

    def lay_out_codes(self, codes: Tensor, scale: Tensor, mask: Mask) -> Int8BitmaskLayout:
        """Return the layout of a weight."""
        return Int8BitmaskLayout.of(codes.where(mask, 0), scale, mask)
