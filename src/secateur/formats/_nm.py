"""The format of N:M: n values for every group of m columns, and the position of each in its group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur._types import Mask
from secateur.formats._arrays import as_array, as_tensor, entries, expect
from secateur.formats._format import Format
from secateur.patterns import NM, SparsityPattern


@final
@dataclass(frozen=True, eq=False, repr=False)
class NMPacked(Format):
    """Exactly n values for every group of m columns, and the position of each in its group. For ``NM`` up to m = 16.

    A position takes 2 bits for m <= 4, and 4 bits above. For values of so many bits, 2:4 takes ``1/2 + 1/bits`` of the
    dense bytes, and 1:16 takes ``1/16 + 1/(4 bits)``. A group that keeps fewer than n weights stores zeros at its first
    free positions.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, groups * n]``, by column within a row.
        indices: uint8 ``[out, ceil(groups * n * b / 8)]`` with ``b`` bits for each position, in the order of the
            values, the lowest bits first. Unused bits are 0. Positions ascend within a group.
        right: ``[out, in % m]`` of value dtype: the columns beyond the last whole group. None where there are none.
    """

    name: ClassVar[str] = "nm"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (NM,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales", "indices", "right")
    _largest_group: ClassVar[int | None] = 16  # a position takes 4 bits at most

    indices: Tensor
    right: Tensor | None

    def positions(self) -> Tensor:
        """Return the position of each value in its group, uint8 ``[out, groups, n]``."""
        n, m = _nm(self.pattern)
        bits, groups = _position_bits(m), self.shape[1] // m
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (as_array(self.indices)[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        codes = codes.reshape(self.shape[0], self.indices.shape[1] * len(shifts))[:, : groups * n]
        return as_tensor(codes.reshape(self.shape[0], groups, n), self.values)

    def mask(self) -> Mask:
        return as_tensor(self._scatter(np.ones(self.values.shape, np.bool_), True), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        n, m = _nm(pattern)
        rows, columns = mask.shape
        groups = columns // m
        core = mask[:, : groups * m].cpu().numpy().reshape(rows, groups, m)
        missing = n - np.count_nonzero(core, axis=2)
        if (crowded := np.argwhere(missing < 0)).size:
            row, group = crowded[0]
            raise PatternError(
                f"row {row}, columns {group * m} to {group * m + m - 1} keep {n - missing[row, group]} weights, "
                f"but {n}:{m} keeps at most {n}."
            )
        if missing.any():
            free = np.logical_not(core)
            core = core | (free & (free.cumsum(2, dtype=np.int8) <= missing[:, :, None]))  # exactly n in each group
        dense = as_array(stored)
        values = entries(dense[:, : groups * m], core).reshape(rows, groups * n)
        codes = (np.flatnonzero(core) % m).astype(np.uint8).reshape(rows, groups * n)
        right = as_tensor(dense[:, groups * m :].copy(), stored, stored.dtype) if columns % m else None
        indices = as_tensor(_pack_codes(codes, _position_bits(m)), stored)
        return cls((rows, columns), pattern, as_tensor(values, stored, stored.dtype), scales, indices, right)

    def _stored(self) -> Tensor:
        right = None if self.right is None else as_array(self.right)
        return as_tensor(self._scatter(as_array(self.values), right), self.values, self.values.dtype)

    def _scatter(self, values: NDArray[Any], right: Any) -> NDArray[Any]:
        """A matrix with the values in their places, and ``right`` in the columns beyond the last group."""
        m = _nm(self.pattern)[1]
        groups = self.shape[1] // m
        dense = np.zeros(self.shape, values.dtype)
        columns = as_array(self.positions()) + np.arange(0, groups * m, m, dtype=np.int64)[:, None]
        np.put_along_axis(dense, columns.reshape(values.shape), values, axis=1)
        if self.right is not None:
            dense[:, groups * m :] = right
        return dense

    def _check(self) -> None:
        n, m = _nm(self.pattern)
        rows, groups, bits = self.shape[0], self.shape[1] // m, _position_bits(m)
        expect("values", self.values, self.values.dtype, (rows, groups * n))
        expect("indices", self.indices, torch.uint8, (rows, math.ceil(groups * n * bits / 8)))
        if self.right is not None:
            expect("right", self.right, self.values.dtype, (rows, self.shape[1] % m))
        used = groups * n * bits % 8
        if used and (as_array(self.indices)[:, -1] >> used).any():
            raise FormatError("indices has bits set beyond its last position; they should be 0.")
        positions = as_array(self.positions())
        if positions.size and positions.max() >= m:
            raise FormatError(f"indices names position {positions.max()} of a group, but {self.pattern} has {m}.")
        if (falls := np.argwhere(positions[:, :, 1:] <= positions[:, :, :-1])).size:
            row, group, _ = falls[0]
            found = positions[row, group].tolist()
            raise FormatError(f"indices of row {row}, group {group} are {found}; they should ascend.")

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        n, m = _nm(pattern)
        rows, columns = mask.shape
        groups = columns // m
        core = mask[:, : groups * m].reshape(rows, groups, m)
        if core.numel() and int(core.sum(2, dtype=torch.uint8).max()) > n:  # sums of int64 take 10 times as long
            return None
        index_bytes = math.ceil(groups * n * _position_bits(m) / 8)
        return rows * (groups * n + columns % m), rows * index_bytes, rows


def _nm(pattern: SparsityPattern) -> tuple[int, int]:
    assert isinstance(pattern, NM)
    return pattern.n, pattern.m


def _position_bits(m: int) -> int:
    return 2 if m <= 4 else 4


def _pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    length = math.ceil(codes.shape[1] / per_byte)
    padded = np.pad(codes, ((0, 0), (0, length * per_byte - codes.shape[1]))).reshape(len(codes), length, per_byte)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded << np.arange(0, 8, bits, dtype=np.uint8), axis=2)
    return packed
