"""The layout of dense tiles, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import DensePacked, Format
from secateur.kernels._layout import SPARE, Layout, in_large_pages, offsets_of, prepare, shape_of
from secateur.kernels._route import LayoutRoute
from secateur.patterns import Block, SparsityPattern


@dataclass(frozen=True, eq=False)
class TileLayout(Layout):
    """Dense tiles of any size, cut into strips of 16, 8, 4, 2 or 1 rows, whose sums stay in registers."""

    tile_columns: Tensor  # [tiles] int32, the column of tiles that each tile is in
    first_tiles: Tensor  # [rows of tiles + 1] int64, the first tile of each row of tiles
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
        """Pack a weight ``[out, in]`` by tiles. A tile is stored whole if the mask keeps any weight of it.

        Raises:
            KernelError: the tiles do not divide the weight.
        """
        values, mask, scale = prepare(weight, mask, value_dtype)
        shape = shape_of(values)
        if height < 1 or width < 1 or shape[0] % height or shape[1] % width:
            raise KernelError(
                f"tiles of {height}x{width} do not divide a weight of {shape[0]}x{shape[1]}; the layout has only whole "
                "tiles. PanelLayout takes any weight."
            )
        kept = mask.view(shape[0] // height, height, shape[1] // width, width).any(3).any(1)
        tiles = values.view(shape[0] // height, height, shape[1] // width, width).transpose(1, 2)[kept]
        row, column = kept.nonzero(as_tuple=True)
        layout = cls(shape, tiles, scale, column.to(torch.int32), offsets_of(kept.sum(1)), height, width)
        flat = values.new_zeros(tiles.numel() + SPARE)
        for target, first, strip in layout._strips(row):
            flat[target] = tiles[:, first : first + strip].transpose(1, 2).flatten(1)
        return cls(shape, in_large_pages(flat), scale, layout.tile_columns, layout.first_tiles, height, width)

    def _strips(self, row: Tensor) -> list[tuple[Tensor, int, int]]:
        """For each strip of a tile: the places of its values ``[tiles, width * rows]``, its first row, and its rows."""
        begin, count = self.first_tiles[:-1][row], self.first_tiles.diff()[row]
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
        row = torch.repeat_interleave(torch.arange(rows // self.height), self.first_tiles.diff())
        tiles = self.values.new_zeros(len(row), self.height, self.width)
        for target, first, strip in self._strips(row):
            tiles[:, first : first + strip] = self.values[target].view(len(row), self.width, strip).transpose(1, 2)
        weight = self.values.new_zeros(rows // self.height, columns // self.width, self.height, self.width)
        weight[row, self.tile_columns.long()] = tiles
        return self._scaled(weight.transpose(1, 2).reshape(rows, columns))

    def arguments(self) -> tuple[int, ...]:
        return self.tile_columns.data_ptr(), self.first_tiles.data_ptr(), self.height, self.width


_STRIP = 16  # rows: a higher tile is cut into strips of this height
_WIDEST = 9999  # columns that the text of a route can name


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
        """One for each block pattern that the zeros satisfy and that divides the weight; without zeros, whole rows."""
        rows, columns = packed.shape
        if isinstance(packed, DensePacked):  # which reads values of fewer bits in the place of float32
            return [cls(_STRIP, columns)] if rows % _STRIP == 0 and 0 < columns <= _WIDEST else []
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
