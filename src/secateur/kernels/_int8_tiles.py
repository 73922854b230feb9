"""The layout of kept tiles of bytes, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import ColumnPacked, Format, RowPacked
from secateur.kernels._int8 import MOST_COLUMNS, Int8Layout, Int8Route, check_columns, round_weight
from secateur.kernels._layout import in_large_pages, offsets_of, padded, shape_of
from secateur.patterns import Block, SparsityPattern

_BYTES = 4  # of a word: what one instruction multiplies and adds
_SPARE = 64  # zeros after the last tile: a kernel loads whole vectors, which may start at any tile
_TILES = ((1, 4), (4, 4), (4, 1))
# Rows that run together: with all columns, and with sections of so many columns, for tiles that use each input once.
# Then the inputs of a section stay in a near cache: in the first one for 32 rows of x.
_PANEL, _HIGH_PANEL, _SECTION = 16, 64, 1024
# The largest share of kept tiles, of weights whose zeros have no pattern, that is worth measuring.
_MOST_KEPT = 0.5


@dataclass(frozen=True, eq=False)
class Int8TileLayout(Int8Layout):
    """The kept tiles of a weight as bytes. A tile is one of three:

    - 1x4: four neighbours of one row,
    - 4x4: four neighbours of each of four rows,
    - 4x1: four rows of one column. Four kept columns of the same rows are stored together.
    """

    places: Tensor  # uint16, the word of four columns that each tile is in; for 4x1 the four columns
    first_tiles: Tensor  # [panels * sections * rows of tiles + 1] int64, the first tile of each row of a section
    height: int
    width: int
    sections: int
    panel: int
    kernel = "int8_tiles"

    @classmethod
    def pack(cls, weight: Weight, mask: Mask | None = None, *, height: int, width: int) -> Int8TileLayout:
        """Pack a weight ``[out, in]`` by tiles. A tile is stored whole if the mask keeps any weight of it.

        Raises:
            KernelError: the tiles are none of 1x4, 4x4 and 4x1, or the weight has more than 65,536 columns.
        """
        codes, mask, scale = round_weight(weight, mask)
        return cls.of(codes, scale, mask, height, width)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, mask: Mask, height: int, width: int) -> Int8TileLayout:
        """Return the layout of codes int8 ``[out, in]``, zero where the mask prunes, with a scale for each row."""
        if (height, width) not in _TILES:
            raise KernelError(
                f"tiles of {height}x{width} cannot be multiplied in 8 bits; tiles are 1x4, 4x4 or 4x1, because an "
                "instruction adds four products. Larger blocks are made of these."
            )
        check_columns(codes.shape[1])
        sections, panel = 1, _PANEL
        if height == 1 and codes.shape[1] > 2 * _SECTION:
            sections, panel = -(-codes.shape[1] // _SECTION), _HIGH_PANEL
        wide = padded(codes, panel, max(_BYTES, width))
        by_row = wide.view(len(wide) // height, height, -1, width)
        kept = padded(mask, panel, width)
        kept = kept.view(len(kept) // height, height, -1, width).any(3).any(1)
        row, column = kept.nonzero(as_tuple=True)
        section = column * width // _SECTION if sections > 1 else torch.zeros_like(column)
        each = panel // height
        part = (row // each * sections + section) * each + row % each
        counts = part.bincount(minlength=len(kept) * sections)
        if width == _BYTES:
            order = part.argsort(stable=True)
            first, places, tiles = offsets_of(counts), column[order], by_row[row[order], :, column[order]]
        else:
            first = offsets_of((counts + _BYTES - 1) // _BYTES)
            number = torch.arange(len(row)) - offsets_of(counts)[row]  # of a column among those of its rows
            tile, slot = first[row] + number // _BYTES, number % _BYTES
            places = column.new_zeros(int(first[-1]), _BYTES).index_put_((tile, slot), column)
            tiles = codes.new_zeros(len(places), _BYTES, height)
            tiles = tiles.index_put_((tile, slot), by_row[row, :, column, 0]).transpose(1, 2)
        return cls(
            shape_of(codes),
            in_large_pages(tiles, _SPARE),
            scale.float(),
            codes.sum(1, dtype=torch.int32),
            in_large_pages(places.to(torch.int16).view(torch.uint16), _SPARE),
            first,
            height,
            width,
            sections,
            panel,
        )

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        each, count = self.panel // self.height, int(self.first_tiles[-1])
        tiles = self.values[: count * self.height * _BYTES].view(count, self.height, _BYTES)
        places = self.places.to(torch.int64)
        if self.width == _BYTES:
            places = places[:count, None] * _BYTES + torch.arange(_BYTES)
        else:
            places = places[: count * _BYTES].view(count, _BYTES)
        part = torch.repeat_interleave(torch.arange(len(self.first_tiles) - 1), self.first_tiles.diff())
        row = part // (each * self.sections) * each + part % each
        wide = torch.zeros(-(-rows // self.panel) * each, -(-columns // _BYTES) * _BYTES, self.height)
        # A tile of columns that is not full has zeros at column 0.
        wide.index_put_((row[:, None].expand_as(places), places), tiles.transpose(1, 2).float(), accumulate=True)
        return self._scaled(wide.transpose(1, 2).reshape(-1, wide.shape[1])[:rows, :columns])

    def arguments(self) -> tuple[int, ...]:
        return (
            self.sums.data_ptr(),
            self.places.data_ptr(),
            self.first_tiles.data_ptr(),
            self.height,
            self.width,
            self.sections,
            self.panel,
        )


@dataclass(frozen=True)
class Int8TileRoute(Int8Route):
    """Run :class:`Int8TileLayout`.

    Args:
        height: rows of a tile.
        width: columns of a tile.
    """

    name: ClassVar[str] = "int8-tiles"
    grammar: ClassVar[str] = r"(4|1(?=x4))x([14])"

    height: int
    width: int

    @classmethod
    def fits(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One for each kind of tile that blocks consist of, or that hold few of the weights without a pattern."""
        if isinstance(packed, RowPacked | ColumnPacked):
            return []
        blocks = [pattern for pattern in patterns if isinstance(pattern, Block)]
        found = [
            cls(height, width)
            for height, width in _TILES
            if any(not (block.height % height or block.width % width) for block in blocks)
        ]
        if cls(_BYTES, _BYTES) in found:
            return [cls(_BYTES, _BYTES)]  # it reads each input once for four rows
        # Without blocks, a tile of four is stored if any of its weights is.
        return found or ([cls(1, _BYTES)] if 1 - (1 - density) ** _BYTES <= _MOST_KEPT else [])

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits whose sums fit 32 bits."""
        return None if packed.shape[1] <= MOST_COLUMNS else f"it has more than {MOST_COLUMNS:,} inputs"

    def lay_out_codes(self, codes: Tensor, scale: Tensor, mask: Mask) -> Int8TileLayout:
        """Return the layout of a weight."""
        return Int8TileLayout.of(codes, scale, mask, self.height, self.width)
