"""The layout of panels of rows, cut into sections of columns, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import ColumnPacked, DensePacked, Format, RowPacked
from secateur.kernels._layout import SPARE, Layout, entries, in_large_pages, offsets_of, padded, prepare, shape_of
from secateur.kernels._route import LayoutRoute
from secateur.patterns import SparsityPattern


@dataclass(frozen=True, eq=False)
class PanelLayout(Layout):
    """Panels of rows, cut into sections of columns.

    All rows of a panel read the inputs of one section before those of the next, so that these inputs stay in the
    nearest cache. A column is counted from the first one of its section: in one byte for sections of up to 256 columns,
    else in two. One section for all columns is an ordinary list of indices, for few input rows at high sparsity.
    """

    index: Tensor  # [nnz] uint8 or uint16, column within the section
    counts: Tensor  # [panels, sections, height] uint16, values of each row in each section
    offsets: Tensor  # [panels * sections + 1] int64, first value of each section of each panel
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
        """Pack the weights ``[out, in]`` that a mask keeps; without a mask, those that are not zero.

        Args:
            weight: ``[out, in]``.
            mask: ``[out, in]`` bool, True = kept.
            value_dtype: dtype of the values.
            height: rows of a panel.
            width: columns of a section.

        Raises:
            KernelError: a height or width that is out of range.
        """
        if not 1 <= width <= cls.WIDEST or height < 1:
            raise KernelError(
                f"a section cannot have {height} rows and {width} columns; it has 1 row or more, and 1 to "
                f"{cls.WIDEST} columns. Give another height or width."
            )
        values, mask, scale = prepare(weight, mask, value_dtype)
        shape = shape_of(values)
        height = min(height, max(shape[0], 1))
        values, mask = padded(values, height, width), padded(mask, height, width)
        panels, sections = mask.shape[0] // height, mask.shape[1] // width
        ordered = mask.view(panels, height, sections, width).transpose(1, 2).contiguous()
        counts = ordered.sum(-1, dtype=torch.int32)
        kept, places = entries(values.view(panels, height, sections, width).transpose(1, 2).contiguous(), ordered)
        index = torch.from_numpy((places.numpy() % width).astype(np.uint8 if width <= 256 else np.uint16))
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
        _, sections, height = self.counts.shape
        counts = torch.from_numpy(self.counts.numpy().astype(np.int64)).flatten()
        segment = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        row = segment // (sections * height) * height + segment % height
        column = segment // height % sections * self.width
        column += torch.from_numpy(self.index.numpy().astype(np.int64))[:-SPARE]
        weight = self.values.new_zeros(self.shape)
        weight[row, column] = self.values[:-SPARE]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        addresses = (self.index.data_ptr(), self.counts.data_ptr(), self.offsets.data_ptr())
        return *addresses, self.height, self.width, self.index.element_size()


# Rows and columns. Each was the fastest for some layer in benchmarks/kernels.py: up to 256 columns have an index of one
# byte, 512 suit sparser weights, whose sections would have few values, and 64 rows suit layers with few outputs.
_SIZES = ((128, 256), (64, 128), (256, 128), (128, 512))
_SPARSE = 0.25  # up to this density one section for all columns may be the fastest for few input rows


@dataclass(frozen=True)
class PanelRoute(LayoutRoute):
    """Run :class:`PanelLayout`.

    Args:
        height: rows of a panel.
        width: columns of a section.
    """

    name: ClassVar[str] = "panels"
    grammar: ClassVar[str] = r"([1-9]\d{0,4})x([1-9]\d{0,4})"

    height: int = 128
    width: int = 256

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """A few sizes, for weights whose zeros may be anywhere, and one section for all columns at high sparsity."""
        if isinstance(packed, RowPacked | ColumnPacked | DensePacked):
            return []
        columns = packed.shape[1]
        whole = density <= _SPARSE and columns <= PanelLayout.WIDEST
        return [cls(*size) for size in _SIZES] + ([cls(64, columns)] if whole else [])

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits. A size that is never measured cannot have been chosen for its speed."""
        if (self.height, self.width) in (*_SIZES, (64, packed.shape[1])) and self.width <= PanelLayout.WIDEST:
            return None
        return f"panels of {self.height}x{self.width} are never measured for a weight of {packed.shape[1]} inputs"

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight."""
        return PanelLayout.pack(values, mask, value_dtype=values.dtype, height=self.height, width=self.width)
