"""Panels of rows, cut into blocks of columns that stay in the nearest cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import ColumnPacked, Format, RowPacked
from secateur.kernels._layout import SPARE, Layout, in_large_pages, offsets_of, padded, prepare, shape_of
from secateur.kernels._route import LayoutRoute
from secateur.patterns import SparsityPattern


@dataclass(frozen=True, eq=False)
class PanelLayout(Layout):
    """Panels of rows cut into blocks of columns, so that a block of the input stays in the nearest cache.

    The columns of a block are counted in one byte up to 256 of them, else in two. With one block for all columns it is
    the plain index form, for few input rows at high sparsity.
    """

    index: Tensor  # [nnz] uint8 or uint16
    counts: Tensor  # [panels, blocks, height] uint16
    offsets: Tensor  # [panels * blocks + 1] int64
    height: int
    width: int
    kernel = "panels"
    WIDEST: ClassVar[int] = 32768

    @classmethod
    def pack(
        cls,
        weight: Weight,
        mask: Mask | None = None,
        *,
        value_dtype: torch.dtype = torch.float32,
        height: int = 128,
        width: int = 256,
    ) -> PanelLayout:
        """Pack what the mask keeps of a weight [out, in], in panels of `height` rows and blocks of `width` columns."""
        if not 1 <= width <= cls.WIDEST or height < 1:
            raise KernelError(
                f"panels of {height} rows and {width} columns: expected 1 row or more and 1 to {cls.WIDEST} columns."
            )
        values, mask, scale = prepare(weight, mask, value_dtype)
        shape = shape_of(values)
        height = min(height, max(shape[0], 1))
        values, mask = padded(values, height, width), padded(mask, height, width)
        panels, blocks = mask.shape[0] // height, mask.shape[1] // width
        ordered = mask.view(panels, height, blocks, width).transpose(1, 2).contiguous()
        counts = ordered.sum(-1)
        columns = torch.arange(width, dtype=torch.int32).expand_as(ordered)[ordered].numpy()
        index = torch.from_numpy(columns.astype(np.uint8 if width <= 256 else np.uint16))
        kept = values.view(panels, height, blocks, width).transpose(1, 2)[ordered]
        small = torch.from_numpy(counts.numpy().astype(np.uint16))
        return cls(
            shape,
            in_large_pages(kept, SPARE),
            scale,
            in_large_pages(index, SPARE),
            small,
            offsets_of(counts.sum(-1)),
            height,
            width,
        )

    def to_dense(self) -> Weight:
        _, blocks, height = self.counts.shape
        counts = torch.from_numpy(self.counts.numpy().astype(np.int64)).flatten()
        segment = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        row = segment // (blocks * height) * height + segment % height
        column = segment // height % blocks * self.width
        column += torch.from_numpy(self.index.numpy().astype(np.int64))[:-SPARE]
        weight = self.values.new_zeros(self.shape)
        weight[row, column] = self.values[:-SPARE]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        addresses = (self.index.data_ptr(), self.counts.data_ptr(), self.offsets.data_ptr())
        return *addresses, self.height, self.width, self.index.element_size()


# Sizes that won somewhere in benchmarks/kernels.py; low panels are for layers of few rows.
_SIZES = ((128, 256), (64, 128), (256, 128), (128, 512))
_SPARSE = 0.25  # up to this density one block for all columns, the plain index form, may win at few input rows


@dataclass(frozen=True)
class PanelRoute(LayoutRoute):
    """Run :class:`PanelLayout`.

    Args:
        height: rows of a panel.
        width: columns of a block.
    """

    name: ClassVar[str] = "panels"
    grammar: ClassVar[str] = r"([1-9]\d{0,4})x([1-9]\d{0,4})"

    height: int = 128
    width: int = 256

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """A few sizes, for weights whose zeros may be anywhere; one block for all columns at high sparsity."""
        if isinstance(packed, RowPacked | ColumnPacked):
            return []
        columns = packed.shape[1]
        whole = density <= _SPARSE and columns <= PanelLayout.WIDEST
        return [cls(*size) for size in _SIZES] + ([cls(64, columns)] if whole else [])

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits; a size that is never measured was not chosen for its speed."""
        if (self.height, self.width) in (*_SIZES, (64, packed.shape[1])) and self.width <= PanelLayout.WIDEST:
            return None
        return f"panels of {self.height}x{self.width} are never measured for a weight of {packed.shape[1]} inputs"

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight."""
        return PanelLayout.pack(values, mask, value_dtype=values.dtype, height=self.height, width=self.width)
