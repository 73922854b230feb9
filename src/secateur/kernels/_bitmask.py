"""The layout of rows of kept values, with one bit for each column, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import ColumnPacked, DensePacked, Format, RowPacked
from secateur.kernels._layout import (
    SPARE,
    Layout,
    bits_of,
    entries,
    in_large_pages,
    kept_of,
    offsets_of,
    prepare,
    shape_of,
)
from secateur.kernels._route import LayoutRoute
from secateur.patterns import SparsityPattern


@dataclass(frozen=True, eq=False)
class BitmaskLayout(Layout):
    """Rows of kept values, with one bit for each column: for one input row, and for densities of a quarter and more."""

    mask: Tensor  # [out, ceil(in / 64)] int64, lowest bit first
    offsets: Tensor  # [out + 1] int64
    kernel = "bitmask"

    @classmethod
    def pack(
        cls, weight: Weight, mask: Mask | None = None, *, value_dtype: torch.dtype = torch.float32
    ) -> BitmaskLayout:
        """Pack the weights ``[out, in]`` that a mask keeps; without a mask, those that are not zero."""
        values, mask, scale = prepare(weight, mask, value_dtype)
        kept, _ = entries(values, mask)
        counts = mask.sum(1, dtype=torch.int32)
        return cls(shape_of(values), in_large_pages(kept, SPARE), scale, bits_of(mask), offsets_of(counts))

    def to_dense(self) -> Weight:
        weight = self.values.new_zeros(self.shape)
        weight[kept_of(self.mask, self.shape[1])] = self.values[:-SPARE]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        return self.mask.data_ptr(), self.offsets.data_ptr()


@dataclass(frozen=True)
class BitmaskRoute(LayoutRoute):
    """Run :class:`BitmaskLayout`."""

    name: ClassVar[str] = "bitmask"
    stores_zeros: ClassVar[bool] = True  # so that the values of a Bitmask are its values, and share their memory

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One, for weights whose zeros may be anywhere."""
        return [] if isinstance(packed, RowPacked | ColumnPacked | DensePacked) else [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits."""
        return None

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight."""
        return BitmaskLayout.pack(values, mask, value_dtype=values.dtype)
