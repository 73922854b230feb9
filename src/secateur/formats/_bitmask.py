"""The format of any mask: one bit for each weight, and the kept values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self, final

import numpy as np
import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur._types import Mask
from secateur.formats._arrays import as_array, as_tensor, check_offsets, entries, expect, population, starts_of
from secateur.formats._format import Format
from secateur.formats._halves import Halves, pack_codes, unpack_codes
from secateur.formats._values import INT4
from secateur.patterns import SparsityPattern, Unstructured


@final
@dataclass(frozen=True, eq=False, repr=False)
class Bitmask(Format):
    """One bit for each weight, and the kept values row by row. For any mask.

    It takes density + 1/bits of the dense bytes, for values of so many bits. The tensors have the byte layout of
    compressed-tensors' ``sparse-bitmask``.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[stored]``, row-major. With int4: uint8
            ``[bytes]``, the lower half of a byte first, 8 added to each number. Each group of 64 columns of a row
            starts at a whole byte.
        bitmask: uint8 ``[out, ceil(in / 8)]``. Bit ``j % 8`` (from the lowest) of byte ``j // 8`` is column j. Bits
            beyond the last column are 0.
        row_offsets: int64 ``[out]``, how many values (with int4: bytes) the rows before each row have.
    """

    name: ClassVar[str] = "bitmask"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (SparsityPattern,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales", "bitmask", "row_offsets")
    _default: ClassVar[SparsityPattern | None] = Unstructured()

    _int4_nbytes: ClassVar[staticmethod[[Mask], int] | None] = staticmethod(
        lambda mask: Halves.of(mask.cpu().numpy()).total
    )

    bitmask: Tensor
    row_offsets: Tensor

    def mask(self) -> Mask:
        bits = np.unpackbits(as_array(self.bitmask), axis=1, count=self.shape[1], bitorder="little")
        return as_tensor(bits.view(np.bool_), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        kept = mask.cpu().numpy()
        bitmask = as_tensor(np.packbits(kept, axis=1, bitorder="little"), stored)
        if scales is not None and scales.dim() == 2:
            packed, starts = pack_codes(stored.cpu(), mask.cpu())
            values, offsets = packed.to(stored.device), starts.to(stored.device)
        else:
            values = as_tensor(entries(as_array(stored), kept), stored, stored.dtype)
            offsets = as_tensor(starts_of(kept), stored)
        return cls((mask.shape[0], mask.shape[1]), pattern, values, scales, bitmask, offsets)

    def _stored(self) -> Tensor:
        kept = self.mask().cpu()
        if self.value_dtype == INT4:
            return unpack_codes(self.values.cpu(), kept).to(self.values.device)
        values = as_array(self.values)
        dense = np.zeros(self.shape, dtype=values.dtype)
        dense.ravel()[np.flatnonzero(kept.numpy())] = values
        return as_tensor(dense, self.values, self.values.dtype)

    def _check(self) -> None:
        rows, columns = self.shape
        expect("values", self.values, self.values.dtype, (None,))
        expect("bitmask", self.bitmask, torch.uint8, (rows, math.ceil(columns / 8)))
        expect("row_offsets", self.row_offsets, torch.int64, (rows,))
        bits, total = as_array(self.bitmask), len(self.values)
        if columns % 8 and (bits[:, -1] >> (columns % 8)).any():
            raise FormatError(f"bitmask has bits set beyond the last of {columns} columns; they should be 0.")
        check_offsets(as_array(self.row_offsets), total, "values")
        if self.value_dtype == INT4:
            Halves.of(self.mask().cpu().numpy()).check(as_array(self.values), as_array(self.row_offsets))
            return
        counts = population(bits)
        if counts.sum() != total:
            raise FormatError(f"bitmask marks {counts.sum()} weights, but there are {total} values.")
        starts = np.cumsum(counts) - counts
        if (wrong := np.flatnonzero(starts != as_array(self.row_offsets))).size:
            row = int(wrong[0])
            raise FormatError(
                f"row_offsets start row {row} at value {int(self.row_offsets[row])}, "
                f"but the bitmask has {starts[row]} weights before it."
            )

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        rows = mask.shape[0]
        return int(mask.count_nonzero()), rows * (math.ceil(mask.shape[1] / 8) + 8), rows
