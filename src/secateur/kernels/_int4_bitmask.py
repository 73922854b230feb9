"""The layout of rows of kept codes of 4 bits, with one bit for each column, and its route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import GRIDS, pack_codes, unpack_codes
from secateur.kernels._int4 import Int4Layout, Int4Route, round_groups, weight_sums
from secateur.kernels._int8 import check_columns
from secateur.kernels._layout import SPARE_BYTES, bits_of, in_large_pages, kept_of, shape_of


@dataclass(frozen=True, eq=False)
class Int4BitmaskLayout(Int4Layout):
    """Rows of kept codes, two in a byte, with one bit for each column. Each group starts at a whole byte."""

    mask: Tensor  # [out, groups] int64, lowest bit first
    offsets: Tensor  # [out + 1] int64, bytes
    scales: Tensor  # [out, groups] float16
    kernel = "int4_bitmask"

    @classmethod
    def pack(cls, weight: Weight, mask: Mask | None = None) -> Int4BitmaskLayout:
        """Pack the weights ``[out, in]`` that a mask keeps; without a mask, those that are not zero.

        Raises:
            KernelError: more than 65,536 columns.
        """
        codes, scales, mask = round_groups(weight, mask)
        return cls.of(codes, scales, mask)

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, mask: Mask) -> Int4BitmaskLayout:
        """Return the layout of codes int8 ``[out, in]``, zero where the mask prunes, and scales of groups."""
        check_columns(codes.shape[1])
        values, starts = pack_codes(codes, mask)
        offsets = torch.cat([starts, starts.new_tensor([len(values)])])
        sums = weight_sums(codes, scales)
        values = in_large_pages(values, SPARE_BYTES)
        return cls(shape_of(codes), values, None, sums, bits_of(mask), offsets, scales.contiguous())

    def to_dense(self) -> Weight:
        kept = kept_of(self.mask, self.shape[1])
        codes = unpack_codes(self.values[:-SPARE_BYTES], kept)
        return codes * GRIDS["int4"].spread(self.scales, self.shape[1])

    def arguments(self) -> tuple[int, ...]:
        return self.mask.data_ptr(), self.offsets.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr()


@dataclass(frozen=True)
class Int4BitmaskRoute(Int4Route):
    """Run :class:`Int4BitmaskLayout`."""

    name: ClassVar[str] = "int4-bitmask"
    stores_zeros: ClassVar[bool] = True  # so that the values of a Bitmask are its values, and share their memory

    def lay_out_groups(self, codes: Tensor, scales: Tensor, mask: Mask) -> Int4BitmaskLayout:
        """Return the layout of a weight."""
        return Int4BitmaskLayout.of(codes.where(mask, 0), scales, mask)
