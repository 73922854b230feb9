"""Dense tiles, cut into strips of rows whose sums stay in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import Format
from secateur.kernels._layout import SPARE, Layout, in_large_pages, offsets_of, prepare, shape_of
from secateur.kernels._route import LayoutRoute
from secateur.patterns import Block, SparsityPattern


@dataclass(frozen=True, eq=False)
class TileLayout(Layout):
    """Dense blocks of any size, cut into strips of 16, 8, 4, 2 or 1 rows whose sums stay in registers."""

    block_columns: Tensor  # [blocks] int32
    block_rows: Tensor  # [row blocks + 1] int64
    height: int
    width: int
    kernel = "tiles"

    @classmethod
    def pack(
        cls,
        weight: Weight,
        mask: Mask | None = None,
        *,
        height: int,
        width: int,
        value_dtype: torch.dtype = torch.float32,
    ) -> TileLayout:
        """Pack a weight [out, in] by blocks: a block of which the mask keeps anything is stored whole."""
        values, mask, scale = prepare(weight, mask, value_dtype)
        shape = shape_of(values)
        if height < 1 or width < 1 or shape[0] % height or shape[1] % width:
            raise KernelError(
                f"blocks of {height}x{width} do not divide a weight of {shape[0]}x{shape[1]}; strips need whole "
                "blocks. Use PanelLayout for a weight with a remainder."
            )
        kept = mask.view(shape[0] // height, height, shape[1] // width, width).any(3).any(1)
        blocks = values.view(shape[0] // height, height, shape[1] // width, width).transpose(1, 2)[kept]
        row, column = kept.nonzero(as_tuple=True)
        layout = cls(shape, blocks, scale, column.to(torch.int32), offsets_of(kept.sum(1)), height, width)
        flat = values.new_zeros(blocks.numel() + SPARE)
        for target, first, strip in layout._strips(row):
            flat[target] = blocks[:, first : first + strip].transpose(1, 2).flatten(1)
        return cls(shape, in_large_pages(flat), scale, layout.block_columns, layout.block_rows, height, width)

    def _strips(self, row: Tensor) -> list[tuple[Tensor, int, int]]:
        """For each strip of a block: where its values [blocks, width * strip rows] lie, its first row, its rows."""
        begin, count = self.block_rows[:-1][row], self.block_rows.diff()[row]
        number = torch.arange(len(row)) - begin
        found, first = [], 0
        while first < self.height:
            strip = min(16, 1 << (self.height - first).bit_length() - 1)
            start = begin * self.height * self.width + (first * count + number * strip) * self.width
            found.append((start[:, None] + torch.arange(self.width * strip), first, strip))
            first += strip
        return found

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        row = torch.repeat_interleave(torch.arange(rows // self.height), self.block_rows.diff())
        blocks = self.values.new_zeros(len(row), self.height, self.width)
        for target, first, strip in self._strips(row):
            blocks[:, first : first + strip] = self.values[target].view(len(row), self.width, strip).transpose(1, 2)
        weight = self.values.new_zeros(rows // self.height, columns // self.width, self.height, self.width)
        weight[row, self.block_columns.long()] = blocks
        return self._scaled(weight.transpose(1, 2).reshape(rows, columns))

    def arguments(self) -> tuple[int, ...]:
        return self.block_columns.data_ptr(), self.block_rows.data_ptr(), self.height, self.width


@dataclass(frozen=True)
class TileRoute(LayoutRoute):
    """Run :class:`TileLayout`.

    Args:
        height: rows of a tile.
        width: columns of a tile.
    """

    name: ClassVar[str] = "tiles"
    grammar: ClassVar[str] = r"([1-9]\d{0,3})x([1-9]\d{0,3})"

    height: int
    width: int

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One for each block pattern that the zeros satisfy and that divides the weight."""
        rows, columns = packed.shape
        return [
            cls(pattern.height, pattern.width)
            for pattern in patterns
            if isinstance(pattern, Block) and not (rows % pattern.height or columns % pattern.width)
        ]

    def why_not(self, packed: Format) -> str | None:
        """The tiles must divide the weight."""
        rows, columns = packed.shape
        if rows % self.height or columns % self.width:
            return f"tiles of {self.height}x{self.width} do not divide a weight of {rows}x{columns}"
        return None

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight."""
        return TileLayout.pack(values, mask, value_dtype=values.dtype, height=self.height, width=self.width)
