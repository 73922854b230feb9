"""The format of tiles: each tile that keeps a weight is stored whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._types import Mask
from secateur.formats._arrays import as_array, as_tensor, check_ascending, check_offsets, expect, starts_of
from secateur.formats._format import Format
from secateur.patterns import Block, SparsityPattern


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockPacked(Format):
    """Each tile that keeps a weight, stored whole, one row of tiles after the other.

    It takes density + density * 32 / (height * width * bits) of the dense bytes, for values of so many bits.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[tiles, height, width]``, by row of tiles, and
            within it by column of tiles.
        block_columns: int32 ``[tiles]``, the column of tiles that each tile is in: its first column over the width. It
            ascends within a row of tiles.
        row_offsets: int64 ``[out // height]``, how many tiles the rows of tiles before each one store.
        right: ``[out // height * height, in % width]`` of value dtype: the columns right of the last whole tile. None
            where there are none.
        bottom: ``[out % height, in]`` of value dtype: the rows below the last whole tile. None where there are none.
    """

    name: ClassVar[str] = "block"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (Block,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales", "block_columns", "row_offsets", "right", "bottom")
    _layout: ClassVar[torch.layout] = torch.sparse_bsr

    block_columns: Tensor
    row_offsets: Tensor
    right: Tensor | None
    bottom: Tensor | None

    def mask(self) -> Mask:
        return as_tensor(self._scatter(np.ones(self.values.shape, np.bool_), True, True), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        rows, columns = mask.shape
        tile_rows, tile_columns, height, width = _grid((rows, columns), pattern)
        down, across = tile_rows * height, tile_columns * width
        tiled = tile_rows, height, tile_columns, width
        tiles = mask[:down, :across].cpu().numpy().reshape(tiled).any((1, 3))
        dense = as_array(stored)
        values = dense[:down, :across].reshape(tiled).transpose(0, 2, 1, 3)[tiles]
        at = as_tensor(np.nonzero(tiles)[1].astype(np.int32), stored)
        right = as_tensor(dense[:down, across:].copy(), stored, stored.dtype) if columns % width else None
        bottom = as_tensor(dense[down:].copy(), stored, stored.dtype) if rows % height else None
        values_tensor = as_tensor(values, stored, stored.dtype)
        return cls(
            (rows, columns), pattern, values_tensor, scales, at, as_tensor(starts_of(tiles), stored), right, bottom
        )

    def _stored(self) -> Tensor:
        rest = [None if part is None else as_array(part) for part in (self.right, self.bottom)]
        return as_tensor(self._scatter(as_array(self.values), *rest), self.values, self.values.dtype)

    def _scatter(self, values: NDArray[Any], right: Any, bottom: Any) -> NDArray[Any]:
        """A matrix with the tiles in their places, and ``right`` and ``bottom`` beyond the last whole tile."""
        tile_rows, tile_columns, height, width = _grid(self.shape, self.pattern)
        down, across = tile_rows * height, tile_columns * width
        tiles = np.zeros((tile_rows, tile_columns, height, width), values.dtype)
        counts = np.diff(as_array(self.row_offsets), append=len(values))
        tiles[np.repeat(np.arange(tile_rows), counts), as_array(self.block_columns)] = values
        dense = np.zeros(self.shape, values.dtype)
        dense[:down, :across] = tiles.transpose(0, 2, 1, 3).reshape(down, across)
        if self.right is not None:
            dense[:down, across:] = right
        if self.bottom is not None:
            dense[down:] = bottom
        return dense

    def _check(self) -> None:
        tile_rows, tile_columns, height, width = _grid(self.shape, self.pattern)
        expect("values", self.values, self.values.dtype, (None, height, width))
        tiles = len(self.values)
        expect("block_columns", self.block_columns, torch.int32, (tiles,))
        expect("row_offsets", self.row_offsets, torch.int64, (tile_rows,))
        if self.right is not None:
            expect("right", self.right, self.values.dtype, (tile_rows * height, self.shape[1] % width))
        if self.bottom is not None:
            expect("bottom", self.bottom, self.values.dtype, (self.shape[0] % height, self.shape[1]))
        offsets = as_array(self.row_offsets)
        check_offsets(offsets, tiles, "tiles")
        check_ascending("block_columns", as_array(self.block_columns), tile_columns, offsets)

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        tile_rows, tile_columns, height, width = _grid(mask.shape, pattern)
        core = mask[: tile_rows * height, : tile_columns * width]
        tiles = core.reshape(tile_rows, height, tile_columns, width)
        stored = int(tiles.any(3).any(1).count_nonzero())
        rest = mask.numel() - core.numel()
        return stored * height * width + rest, 4 * stored + 8 * tile_rows, mask.shape[0]


def _grid(shape: Sequence[int], pattern: SparsityPattern) -> tuple[int, int, int, int]:
    """Whole tiles down and across, and the height and width of one."""
    assert isinstance(pattern, Block)
    return shape[0] // pattern.height, shape[1] // pattern.width, pattern.height, pattern.width
