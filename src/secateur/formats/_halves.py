"""Numbers from -7 to 7, two in a byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._errors import FormatError
from secateur._types import Mask
from secateur.formats._grid import GRIDS

_ADDED = 8  # to each number, so that it has no sign


def pack_halves(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return codes ``[..., n]`` as bytes ``[..., ceil(n / 2)]``, the lower half of a byte first, a last one of 0."""
    halves: NDArray[np.uint8] = (codes + np.int8(_ADDED)).astype(np.uint8)
    if halves.shape[-1] % 2:
        halves = np.concatenate([halves, np.zeros((*halves.shape[:-1], 1), np.uint8)], axis=-1)
    return halves[..., ::2] | (halves[..., 1::2] << np.uint8(4))


def unpack_halves(values: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return the halves of bytes ``[..., n]`` as codes ``[..., 2 n]``."""
    halves = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], 2 * values.shape[-1])
    return halves.astype(np.int8) - np.int8(_ADDED)


@dataclass(frozen=True)
class Halves:
    """Where the kept weights of a mask stand: each group of a row starts at a whole byte.

    Args:
        counts: int64 ``[out, groups]``, kept weights of each group.
    """

    counts: NDArray[np.int64]

    @classmethod
    def of(cls, kept: NDArray[np.bool_]) -> Halves:
        """Return that of a mask ``[out, in]``."""
        size = GRIDS["int4"].group
        assert size is not None
        rows, columns = kept.shape
        padded = np.pad(kept, ((0, 0), (0, -columns % size)))
        return cls(padded.reshape(rows, padded.shape[1] // size, size).sum(2, dtype=np.int64))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum((self.counts.reshape(-1) + 1) // 2)

    @property
    def total(self) -> int:
        """How many bytes there are."""
        return int(self._ends[-1]) if self._ends.size else 0

    @property
    def row_starts(self) -> NDArray[np.int64]:
        """The first byte of each row, int64 ``[out]``."""
        in_rows = ((self.counts + 1) // 2).sum(1)
        starts: NDArray[np.int64] = np.cumsum(in_rows) - in_rows
        return starts

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """The half of each kept weight."""
        counts = self.counts.reshape(-1)
        starts = 2 * (self._ends - (counts + 1) // 2)
        before = np.cumsum(counts) - counts
        places: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(starts - before, counts)
        return places

    def pack(self, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Return codes ``[kept]`` as bytes."""
        halves = np.full(2 * self.total, -_ADDED, np.int8)
        halves[self._places] = codes
        return pack_halves(halves)

    def unpack(self, values: NDArray[np.uint8]) -> NDArray[np.int8]:
        """Return bytes as codes ``[kept]``."""
        codes: NDArray[np.int8] = unpack_halves(values)[self._places]
        return codes

    def check(self, values: NDArray[np.uint8], offsets: NDArray[Any]) -> None:
        """Raise unless bytes and the first byte of each row are those of this mask."""
        if len(values) != self.total:
            raise FormatError(f"the bitmask needs {self.total} bytes of int4 values, but there are {len(values)}.")
        if (wrong := np.flatnonzero(self.row_starts != offsets)).size:
            row = int(wrong[0])
            raise FormatError(
                f"row_offsets start row {row} at byte {int(offsets[row])}, but the groups before it take "
                f"{int(self.row_starts[row])} bytes."
            )
        odd = self._ends[(self.counts.reshape(-1) % 2) == 1] - 1
        if (values[odd] >> 4).any():
            raise FormatError("values have a half beyond the last weight of a group that is not 0; it should be 0.")


def pack_codes(codes: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return the kept codes of a matrix as bytes, and the first byte of each row.

    Args:
        codes: int8 ``[out, in]``, on the CPU.
        mask: ``[out, in]`` bool.

    Returns:
        uint8 ``[bytes]`` and int64 ``[out]``.
    """
    kept = mask.numpy()
    halves = Halves.of(kept)
    return torch.from_numpy(halves.pack(codes.numpy()[kept])), torch.from_numpy(halves.row_starts)


def unpack_codes(values: Tensor, mask: Mask) -> Tensor:
    """Return bytes as codes, int8 ``[out, in]``, zero where the mask is False."""
    kept = mask.numpy()
    codes = np.zeros(kept.shape, np.int8)
    codes[kept] = Halves.of(kept).unpack(values.numpy())
    return torch.from_numpy(codes)
