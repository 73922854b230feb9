"""How a sparse weight is stored. ``docs/format.md`` is the specification, byte by byte."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur._types import Mask, Weight
from secateur.patterns import NM, Block, Column, Row, SparsityPattern, Unstructured

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
MAX_SIDE = 2**31 - 1  # indices are int32
MAX_WEIGHTS = 2**36  # no layer comes near; a tiny file that claims more would have us allocate it
LARGEST_M = 16

_INT8_LIMIT = 127  # -128 is left unused, so that the code is symmetric
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False, repr=False)
class Format(ABC):
    """A sparse ``[out, in]`` weight, held as a few plain tensors that say which weights are stored, and their values.

    What is pruned is not stored and comes back as ``+0.0``; what is stored comes back bit for bit, ``-0.0``, NaN and
    infinities included, unless ``value_dtype`` asks for fewer bits. With int8, a weight is ``code * scale`` with one
    float32 scale for each output row, ``max |w| / 127``; :meth:`error` says what the rounding cost.

    The five formats are :class:`Bitmask`, :class:`NMPacked`, :class:`BlockPacked`, :class:`RowPacked` and
    :class:`ColumnPacked`; :func:`choose` picks the smallest for a pattern. Build one with :meth:`from_dense` (trusted)
    or :meth:`from_tensors` (everything is checked), not by its constructor.

    Args:
        shape: ``(out, in)`` of the dense weight.
        pattern: that the weight was pruned with.
        values: the stored weights, in one of float32, bfloat16, float16 and int8.
        scales: float32, one for each stored row, for int8 values; else None.
    """

    name: ClassVar[str]  # in files
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]]  # patterns that it can hold
    _own: ClassVar[tuple[str, ...]]  # tensors besides values and scales

    shape: tuple[int, int]
    pattern: SparsityPattern
    values: Tensor
    scales: Tensor | None

    @classmethod
    @final
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Weight,
        mask: Mask | None = None,
        pattern: SparsityPattern | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> Self:
        """Pack a dense weight.

        Args:
            weight: ``[out, in]``, floating point.
            mask: ``[out, in]`` bool, True = kept; what it prunes is dropped, whatever its value. None, the default:
                everything that is not zero is kept (``-0.0`` is zero).
            pattern: that the mask follows; needed for :class:`NMPacked` and :class:`BlockPacked`.
            value_dtype: float32, bfloat16, float16 or int8; None, the default: that of the weight.

        Raises:
            PatternError: the mask or the shape breaks the pattern.
            FormatError: a value that ``value_dtype`` cannot hold, or no such dtype.
            TypeError: arguments that are not tensors of these kinds.

        Example:
            >>> import torch
            >>> from secateur.formats import Bitmask
            >>> packed = Bitmask.from_dense(torch.tensor([[0.0, 1.5, 0.0, -2.0]]))
            >>> packed, packed.values.tolist(), packed.bitmask.tolist()
            (Bitmask(1x4, unstructured, float32, 17 bytes), [1.5, -2.0], [[10]])
            >>> packed.to_dense().tolist()
            [[0.0, 1.5, 0.0, -2.0]]
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"a weight must be a floating-point tensor, got {kind}")
        if weight.ndim != 2:
            raise FormatError(f"{cls.__name__} holds a matrix (out, in), got shape {tuple(weight.shape)}.")
        if mask is None:
            mask = weight != 0
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            found = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a mask must be a bool tensor of the weight's shape {tuple(weight.shape)}, got {found}")
        pattern = cls._accept(pattern)
        pattern.validate(weight.shape)
        kept = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device))
        stored, scales = _encode(kept, weight.dtype if value_dtype is None else value_dtype)
        return cls._pack(stored, mask, pattern, scales)

    @final
    def to_dense(self) -> Weight:
        """Return the weight, ``[out, in]``: in the dtype of the values, or float32 where they are int8."""
        stored, scales = self.unscaled()
        return stored if scales is None else stored.float() * scales[:, None]

    @final
    def unscaled(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight in the dtype of the values, ``[out, in]``, and the scale of every row, ``[out]`` or None.

        A kernel that has a layout of its own starts from here, so that int8 codes are not rounded twice.
        """
        return self._stored(), None if self.scales is None else self._row_scales()

    @final
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, ``values`` first, as a file or a module's buffers hold them."""
        named = {name: getattr(self, name) for name in ("values", "scales", *self._own)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    @final
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: Sequence[int], pattern: SparsityPattern | None = None
    ) -> Self:
        """Put together what :meth:`tensors` took apart, after checking all of it: a file is not trusted.

        Afterwards no index can lead outside of a tensor, so that kernels need not look.

        Args:
            tensors: by name; they are used as they are, not copied.
            shape: ``(out, in)`` of the dense weight.
            pattern: as for :meth:`from_dense`.

        Raises:
            FormatError: a tensor that is missing, superfluous, of another dtype or shape, or whose contents cannot be.

        Example:
            >>> import torch
            >>> from secateur.formats import RowPacked
            >>> RowPacked.from_tensors({"values": torch.ones(1, 4), "rows": torch.tensor([3]).int()}, (2, 4))
            Traceback (most recent call last):
            secateur._errors.FormatError: rows names 3, but there are 2.
        """
        size = check_shape(shape)
        try:
            pattern = cls._accept(pattern)
            pattern.validate(size)
        except PatternError as error:
            raise FormatError(str(error)) from None
        right, bottom = _remainder(size, pattern)
        given = {**dict.fromkeys(("right", "bottom")), **{name: tensors[name] for name in tensors}}
        wanted = {"values", *cls._own} - ({"right"} if not right else set()) - ({"bottom"} if not bottom else set())
        if "values" in tensors and tensors["values"].dtype == torch.int8:
            wanted.add("scales")
        if wanted != tensors.keys():
            missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
            raise FormatError(
                f"{cls.__name__} needs the tensors {sorted(wanted)}: {missing} missing, {extra} too many."
            )
        fields: dict[str, Any] = {name: given[name] for name in cls._own}
        packed = cls(size, pattern, tensors["values"], tensors.get("scales"), **fields)
        if packed.values.dtype not in VALUE_DTYPES:
            raise FormatError(
                f"values should be float32, bfloat16, float16 or int8, got {_short(packed.values.dtype)}."
            )
        packed._check()
        if packed.scales is not None:
            _expect("scales", packed.scales, torch.float32, (packed.values.shape[0] if cls is RowPacked else size[0],))
            if not bool((packed.scales.isfinite() & (packed.scales >= 0)).all()):
                raise FormatError("scales should be finite and not negative, but some are not.")
        return packed

    @classmethod
    @final
    def predicted_nbytes(
        cls, mask: Mask, pattern: SparsityPattern | None = None, value_dtype: torch.dtype = torch.float32
    ) -> int | None:
        """Return the bytes that ``from_dense`` would need, without packing; None where it cannot hold the mask."""
        try:
            pattern = cls._accept(pattern)
            pattern.validate(mask.shape)
        except PatternError:
            return None
        counted = cls._count(mask, pattern)
        if counted is None:
            return None
        values, index_bytes, scaled_rows = counted
        return values * value_dtype.itemsize + index_bytes + (4 * scaled_rows if value_dtype == torch.int8 else 0)

    @final
    def convert(self, kind: type[Format], pattern: SparsityPattern | None = None) -> Format:
        """Return the same weight in another format, with the same codes and scales: nothing is rounded again."""
        pattern = kind._accept(pattern)
        pattern.validate(self.shape)
        stored, scales = self.unscaled()
        return kind._pack(stored, self.mask(), pattern, scales)

    @property
    @final
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    @final
    def value_dtype(self) -> torch.dtype:
        """Of the stored values."""
        return self.values.dtype

    @final
    @torch.no_grad()
    def error(self, weight: Weight, mask: Mask | None = None) -> float:
        """Return what ``value_dtype`` cost, ``‖packed - kept‖ / ‖kept‖`` (Frobenius, float64): 0.0 where nothing.

        Args:
            weight: what was packed.
            mask: that it was packed with.
        """
        kept = (weight.detach() if mask is None else weight.detach().where(mask, 0)).double()
        packed = self.to_dense().double()
        same = (packed == kept) | (packed.isnan() & kept.isnan())  # infinities have no difference
        if bool(same.all()):
            return 0.0
        return float(torch.where(same, 0.0, packed - kept).norm() / kept.norm())

    @final
    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return f"{type(self).__name__}({size}, {self.pattern}, {_short(self.value_dtype)}, {self.nbytes:,} bytes)"

    @abstractmethod
    def mask(self) -> Mask:
        """Return which weights are stored, ``[out, in]`` bool: all that were kept, and what shares a unit with them."""

    @classmethod
    @abstractmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        """Pack a matrix of value dtype that is zero where the mask is False; ``scales`` are one for each row."""

    @abstractmethod
    def _stored(self) -> Tensor:
        """The matrix that was packed, before scales."""

    @abstractmethod
    def _check(self) -> None:
        """Raise FormatError unless dtypes, shapes and contents of the tensors fit shape and pattern."""

    @classmethod
    @abstractmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        """How many values a mask needs, bytes of indices, and rows that have a scale; None where it cannot be held."""

    def _row_scales(self) -> Tensor:
        assert self.scales is not None
        return self.scales

    @classmethod
    @final
    def _accept(cls, pattern: SparsityPattern | None) -> SparsityPattern:
        if pattern is None and cls._kinds[0] in (Unstructured, Row, Column):
            return cls._kinds[0]()
        if pattern is None or not isinstance(pattern, cls._kinds):
            wanted = " or ".join(kind.__name__ for kind in cls._kinds)
            raise PatternError(f"{cls.__name__} holds weights pruned with the pattern {wanted}, got {pattern!r}.")
        if isinstance(pattern, NM) and cls is NMPacked and pattern.m > LARGEST_M:
            raise PatternError(f"NMPacked holds groups of up to {LARGEST_M} weights, got {pattern}. Use Bitmask.")
        return pattern


@final
@dataclass(frozen=True, eq=False, repr=False)
class Bitmask(Format):
    """One bit for each weight, and the kept values row by row: density + 1/bits of dense. For any mask.

    The tensors have the byte layout of compressed-tensors' ``sparse-bitmask``.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[stored]``, row-major.
        bitmask: uint8 ``[out, ceil(in / 8)]``; bit ``j % 8`` of byte ``j // 8`` (lowest first) is column j. Bits beyond
            the last column are 0.
        row_offsets: int64 ``[out]``, where each row's values start.
    """

    name: ClassVar[str] = "bitmask"
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]] = (Unstructured, NM, Block, Row, Column)
    _own: ClassVar[tuple[str, ...]] = ("bitmask", "row_offsets")

    bitmask: Tensor
    row_offsets: Tensor

    def mask(self) -> Mask:
        bits = np.unpackbits(_array(self.bitmask), axis=1, count=self.shape[1], bitorder="little")
        return _tensor(bits.view(np.bool_), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        kept = mask.cpu().numpy()
        values = _tensor(_array(stored)[kept], stored, stored.dtype)
        bitmask = _tensor(np.packbits(kept, axis=1, bitorder="little"), stored)
        offsets = _tensor(_starts(kept), stored)
        return cls((mask.shape[0], mask.shape[1]), pattern, values, scales, bitmask, offsets)

    def _stored(self) -> Tensor:
        dense = np.zeros(self.shape, dtype=_array(self.values).dtype)
        dense[self.mask().cpu().numpy()] = _array(self.values)
        return _tensor(dense, self.values, self.values.dtype)

    def _check(self) -> None:
        rows, columns = self.shape
        _expect("values", self.values, self.values.dtype, (None,))
        _expect("bitmask", self.bitmask, torch.uint8, (rows, math.ceil(columns / 8)))
        _expect("row_offsets", self.row_offsets, torch.int64, (rows,))
        bits, total = _array(self.bitmask), len(self.values)
        if columns % 8 and (bits[:, -1] >> (columns % 8)).any():
            raise FormatError(f"bitmask has bits set beyond the last of {columns} columns; they should be 0.")
        _check_offsets(_array(self.row_offsets), total, "values")
        counts = population(bits)
        if counts.sum() != total:
            raise FormatError(f"bitmask marks {counts.sum()} weights, but there are {total} values.")
        starts = np.cumsum(counts) - counts
        if (wrong := np.flatnonzero(starts != _array(self.row_offsets))).size:
            row = int(wrong[0])
            raise FormatError(
                f"row_offsets start row {row} at value {int(self.row_offsets[row])}, "
                f"but the bitmask has {starts[row]} weights before it."
            )

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        rows = mask.shape[0]
        return int(mask.count_nonzero()), rows * (math.ceil(mask.shape[1] / 8) + 8), rows


@final
@dataclass(frozen=True, eq=False, repr=False)
class NMPacked(Format):
    """Exactly n values for every group of m columns, and the position of each in its group. For ``NM`` up to m = 16.

    A position takes 2 bits for m <= 4 and 4 bits above: 2:4 needs ``1/2 + 1/bits`` of dense, 1:16 a sixteenth and
    ``1/(4 bits)``.
    A group that keeps fewer than n weights stores zeros at its first free positions.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, groups * n]``, by column within a row.
        indices: uint8 ``[out, ceil(groups * n * b / 8)]`` with ``b`` bits a position, in the order of the values, the
            lowest bits first; unused bits are 0. Positions ascend within a group.
        right: ``[out, in % m]`` of value dtype, the columns beyond the last whole group; None where there are none.
    """

    name: ClassVar[str] = "nm"
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]] = (NM,)
    _own: ClassVar[tuple[str, ...]] = ("indices", "right")

    indices: Tensor
    right: Tensor | None

    def positions(self) -> Tensor:
        """Return the position of each value in its group, uint8 ``[out, groups, n]``."""
        n, m = _nm(self.pattern)
        bits, groups = _position_bits(m), self.shape[1] // m
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (_array(self.indices)[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        codes = codes.reshape(self.shape[0], self.indices.shape[1] * len(shifts))[:, : groups * n]
        return _tensor(codes.reshape(self.shape[0], groups, n), self.values)

    def mask(self) -> Mask:
        return _tensor(self._scatter(np.ones(self.values.shape, np.bool_), True), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        n, m = _nm(pattern)
        rows, columns = mask.shape
        groups = columns // m
        core = mask[:, : groups * m].cpu().numpy().reshape(rows, groups, m)
        missing = n - core.sum(2, dtype=np.int8)
        if (crowded := np.argwhere(missing < 0)).size:
            row, group = crowded[0]
            raise PatternError(
                f"row {row}, columns {group * m} to {group * m + m - 1} keep {n - missing[row, group]} weights, "
                f"but {n}:{m} keeps at most {n}."
            )
        if missing.any():
            free = np.logical_not(core)
            core = core | (free & (free.cumsum(2, dtype=np.int8) <= missing[:, :, None]))  # now exactly n in each group
        dense = _array(stored)
        values = dense[:, : groups * m].reshape(core.shape)[core].reshape(rows, groups * n)
        codes = np.broadcast_to(np.arange(m, dtype=np.uint8), core.shape)[core].reshape(rows, groups * n)
        right = _tensor(dense[:, groups * m :].copy(), stored, stored.dtype) if columns % m else None
        indices = _tensor(_pack_codes(codes, _position_bits(m)), stored)
        return cls((rows, columns), pattern, _tensor(values, stored, stored.dtype), scales, indices, right)

    def _stored(self) -> Tensor:
        right = None if self.right is None else _array(self.right)
        return _tensor(self._scatter(_array(self.values), right), self.values, self.values.dtype)

    def _scatter(self, values: NDArray[Any], right: Any) -> NDArray[Any]:
        """A matrix with the values in their places; the columns beyond the last group get ``right``."""
        m = _nm(self.pattern)[1]
        groups = self.shape[1] // m
        dense = np.zeros(self.shape, values.dtype)
        columns = _array(self.positions()) + np.arange(0, groups * m, m, dtype=np.int64)[:, None]
        np.put_along_axis(dense, columns.reshape(values.shape), values, axis=1)
        if self.right is not None:
            dense[:, groups * m :] = right
        return dense

    def _check(self) -> None:
        n, m = _nm(self.pattern)
        rows, groups, bits = self.shape[0], self.shape[1] // m, _position_bits(m)
        _expect("values", self.values, self.values.dtype, (rows, groups * n))
        _expect("indices", self.indices, torch.uint8, (rows, math.ceil(groups * n * bits / 8)))
        if self.right is not None:
            _expect("right", self.right, self.values.dtype, (rows, self.shape[1] % m))
        used = groups * n * bits % 8
        if used and (_array(self.indices)[:, -1] >> used).any():
            raise FormatError("indices has bits set beyond its last position; they should be 0.")
        positions = _array(self.positions())
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
        if core.numel() and int(core.sum(2).max()) > n:
            return None
        index_bytes = math.ceil(groups * n * _position_bits(m) / 8)
        return rows * (groups * n + columns % m), rows * index_bytes, rows


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockPacked(Format):
    """The tiles that keep anything, whole, by block row: density + density * 32 / (height * width * bits) of dense.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[blocks, height, width]``, block row by block
            row, by block column within.
        block_columns: int32 ``[blocks]``, the block column of each (its first column, over the width), ascending
            within a block row.
        row_offsets: int64 ``[out // height]``, where each block row's blocks start.
        right: ``[out // height * height, in % width]`` of value dtype, what is right of the last whole tile; None where
            there is nothing.
        bottom: ``[out % height, in]`` of value dtype, the rows below the last whole tile; None where there are none.
    """

    name: ClassVar[str] = "block"
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]] = (Block,)
    _own: ClassVar[tuple[str, ...]] = ("block_columns", "row_offsets", "right", "bottom")

    block_columns: Tensor
    row_offsets: Tensor
    right: Tensor | None
    bottom: Tensor | None

    def mask(self) -> Mask:
        return _tensor(self._scatter(np.ones(self.values.shape, np.bool_), True, True), self.values)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        rows, columns = mask.shape
        block_rows, block_columns, height, width = grid = _grid((rows, columns), pattern)
        down, across = block_rows * height, block_columns * width
        tiled = block_rows, height, block_columns, width
        tiles = mask[:down, :across].cpu().numpy().reshape(tiled).any((1, 3))
        dense = _array(stored)
        values = dense[:down, :across].reshape(tiled).transpose(0, 2, 1, 3)[tiles]
        at = _tensor(np.nonzero(tiles)[1].astype(np.int32), stored)
        right = _tensor(dense[:down, across:].copy(), stored, stored.dtype) if columns % grid[3] else None
        bottom = _tensor(dense[down:].copy(), stored, stored.dtype) if rows % grid[2] else None
        values_tensor = _tensor(values, stored, stored.dtype)
        return cls((rows, columns), pattern, values_tensor, scales, at, _tensor(_starts(tiles), stored), right, bottom)

    def _stored(self) -> Tensor:
        rest = [None if part is None else _array(part) for part in (self.right, self.bottom)]
        return _tensor(self._scatter(_array(self.values), *rest), self.values, self.values.dtype)

    def _scatter(self, values: NDArray[Any], right: Any, bottom: Any) -> NDArray[Any]:
        block_rows, block_columns, height, width = _grid(self.shape, self.pattern)
        down, across = block_rows * height, block_columns * width
        tiles = np.zeros((block_rows, block_columns, height, width), values.dtype)
        counts = np.diff(_array(self.row_offsets), append=len(values))
        tiles[np.repeat(np.arange(block_rows), counts), _array(self.block_columns)] = values
        dense = np.zeros(self.shape, values.dtype)
        dense[:down, :across] = tiles.transpose(0, 2, 1, 3).reshape(down, across)
        if self.right is not None:
            dense[:down, across:] = right
        if self.bottom is not None:
            dense[down:] = bottom
        return dense

    def _check(self) -> None:
        block_rows, block_columns, height, width = _grid(self.shape, self.pattern)
        _expect("values", self.values, self.values.dtype, (None, height, width))
        blocks = len(self.values)
        _expect("block_columns", self.block_columns, torch.int32, (blocks,))
        _expect("row_offsets", self.row_offsets, torch.int64, (block_rows,))
        if self.right is not None:
            _expect("right", self.right, self.values.dtype, (block_rows * height, self.shape[1] % width))
        if self.bottom is not None:
            _expect("bottom", self.bottom, self.values.dtype, (self.shape[0] % height, self.shape[1]))
        offsets = _array(self.row_offsets)
        _check_offsets(offsets, blocks, "blocks")
        _check_ascending("block_columns", _array(self.block_columns), block_columns, offsets)

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        block_rows, block_columns, height, width = _grid(mask.shape, pattern)
        core = mask[: block_rows * height, : block_columns * width]
        tiles = core.reshape(block_rows, height, block_columns, width)
        blocks = int(tiles.any(3).any(1).count_nonzero())
        rest = mask.numel() - core.numel()
        return blocks * height * width + rest, 4 * blocks + 8 * block_rows, mask.shape[0]


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowPacked(Format):
    """The rows that keep anything, as a dense matrix, and their numbers: the density of dense, and 4 bytes a row.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[kept, in]``, scales ``[kept]``.
        rows: int32 ``[kept]``, ascending.
    """

    name: ClassVar[str] = "row"
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]] = (Row,)
    _own: ClassVar[tuple[str, ...]] = ("rows",)

    rows: Tensor

    def mask(self) -> Mask:
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask[self.rows.long()] = True
        return mask

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        kept = mask.any(1).nonzero().flatten()
        scales = None if scales is None else scales[kept]
        return cls((mask.shape[0], mask.shape[1]), pattern, stored[kept], scales, kept.int())

    def _stored(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        dense[self.rows.long()] = self.values
        return dense

    def _row_scales(self) -> Tensor:
        scales = torch.ones(self.shape[0], device=self.values.device)
        scales[self.rows.long()] = super()._row_scales()
        return scales

    def _check(self) -> None:
        _expect("values", self.values, self.values.dtype, (None, self.shape[1]))
        _expect("rows", self.rows, torch.int32, (self.values.shape[0],))
        _check_ascending("rows", _array(self.rows), self.shape[0])

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        kept = int(mask.any(1).count_nonzero())
        return kept * mask.shape[1], 4 * kept, kept


@final
@dataclass(frozen=True, eq=False, repr=False)
class ColumnPacked(Format):
    """The columns that keep anything, as a dense matrix, and their numbers: the density of dense, and 4 bytes a column.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, kept]``.
        columns: int32 ``[kept]``, ascending; single columns, also where the pattern prunes channels of several.
    """

    name: ClassVar[str] = "column"
    _kinds: ClassVar[tuple[type[SparsityPattern], ...]] = (Column,)
    _own: ClassVar[tuple[str, ...]] = ("columns",)

    columns: Tensor

    def mask(self) -> Mask:
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask[:, self.columns.long()] = True
        return mask

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        kept = mask.any(0).nonzero().flatten()
        values = stored.index_select(1, kept).contiguous()
        return cls((mask.shape[0], mask.shape[1]), pattern, values, scales, kept.int())

    def _stored(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        dense[:, self.columns.long()] = self.values
        return dense

    def _check(self) -> None:
        _expect("values", self.values, self.values.dtype, (self.shape[0], None))
        _expect("columns", self.columns, torch.int32, (self.values.shape[1],))
        _check_ascending("columns", _array(self.columns), self.shape[1])

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        kept = int(mask.any(0).count_nonzero())
        return kept * mask.shape[0], 4 * kept, mask.shape[0]


FORMATS: dict[str, type[Format]] = {
    kind.name: kind for kind in (Bitmask, NMPacked, BlockPacked, RowPacked, ColumnPacked)
}

_MADE_FOR: dict[type[SparsityPattern], type[Format]] = {
    NM: NMPacked,
    Block: BlockPacked,
    Row: RowPacked,
    Column: ColumnPacked,
}


def choose(pattern: SparsityPattern, mask: Mask, value_dtype: torch.dtype = torch.float32) -> type[Format] | None:
    """Return the smallest format for a mask: the one made for its pattern, or :class:`Bitmask`; of equals the former.

    Which is fastest is another question, that only the machine answers.

    Args:
        pattern: that the mask follows.
        mask: ``[out, in]`` bool, True = kept.
        value_dtype: of the values, and of the dense weight to compare with.

    Returns:
        The format, or None where none is smaller than the dense weight in the same dtype.

    Example:
        >>> import torch, secateur
        >>> from secateur.formats import choose
        >>> mask = secateur.NM(2, 4).mask(torch.rand(8, 64))
        >>> choose(secateur.NM(2, 4), mask).__name__, choose(secateur.Unstructured(), torch.ones(8, 64).bool())
        ('NMPacked', None)
    """
    best: type[Format] | None = None
    smallest = mask.numel() * value_dtype.itemsize
    for kind in (_MADE_FOR.get(type(pattern)), Bitmask):
        size = None if kind is None else kind.predicted_nbytes(mask, pattern, value_dtype)
        if size is not None and size < smallest:
            best, smallest = kind, size
    return best


def check_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix that may be true.

    Raises:
        FormatError: not two sizes, a negative one, or more weights than any layer has.
    """
    sizes = tuple(shape)
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise FormatError(f"the shape should be two integers (out, in), got {sizes}.")
    rows, columns = sizes
    if min(sizes) < 0 or max(sizes) > MAX_SIDE or rows * columns > MAX_WEIGHTS:
        raise FormatError(f"the shape {rows}x{columns} is absurd: sizes are 0 to {MAX_SIDE}, {MAX_WEIGHTS} in all.")
    return rows, columns


def _encode(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Values in the asked dtype, and for int8 the scale of each row."""
    if dtype not in VALUE_DTYPES:
        raise FormatError(
            f"values can be stored as float32, bfloat16, float16 or int8, got {_short(dtype)}.\n"
            "Say which with value_dtype=torch.float32, for example."
        )
    if dtype == kept.dtype:
        return kept, None
    if dtype != torch.int8:
        values = kept.to(dtype)
        _refuse(kept.isfinite() & ~values.isfinite(), kept, f"is beyond the range of {_short(dtype)}")
        return values, None
    _refuse(~kept.isfinite(), kept, "has no int8 code")
    wide = kept.float()
    _refuse(~wide.isfinite(), kept, "is beyond the range of float32, in which scales are kept")
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scales = (largest / _INT8_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)  # tiny weights would divide by zero
    scales = torch.where(largest > 0, scales, 1.0)
    codes = (wide / scales[:, None]).round().clamp(-_INT8_LIMIT, _INT8_LIMIT)
    return codes.to(torch.int8), scales


def _refuse(bad: Tensor, values: Tensor, why: str) -> None:
    if bool(bad.any()):
        row, column = (int(index) for index in bad.nonzero()[0])
        value = float(values[row, column])
        raise FormatError(f"the weight {value:g} at row {row}, column {column} {why}. Use value_dtype=torch.float32.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _array(tensor: Tensor) -> NDArray[Any]:
    """The bits of a tensor as an array of integers, which hold any value and copy exactly; uint8 and bool as is."""
    tensor = tensor.detach().cpu().contiguous()
    plain = tensor.dtype in (torch.uint8, torch.bool)
    array: NDArray[Any] = (tensor if plain else tensor.view(_INTEGERS[tensor.dtype.itemsize])).numpy()
    return array


def _tensor(array: NDArray[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor if dtype is None else tensor.view(dtype)).to(like.device)


def _starts(kept: Any) -> NDArray[np.int64]:
    counts = kept.sum(1, dtype=np.int64)
    starts: NDArray[np.int64] = np.cumsum(counts) - counts
    return starts


def population(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Bits set in each row; numpy counts them itself only from version 2."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts: NDArray[np.int64] = ((nibbles + (nibbles >> 4)) & 0x0F).sum(1, dtype=np.int64)
    return counts


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


def _grid(shape: Sequence[int], pattern: SparsityPattern) -> tuple[int, int, int, int]:
    """Whole tiles down and across, and the height and width of one."""
    assert isinstance(pattern, Block)
    return shape[0] // pattern.height, shape[1] // pattern.width, pattern.height, pattern.width


def _remainder(shape: tuple[int, int], pattern: SparsityPattern) -> tuple[int, int]:
    """Columns and rows beyond the last whole group or tile."""
    match pattern:
        case NM():
            return shape[1] % pattern.m, 0
        case Block():
            return shape[1] % pattern.width, shape[0] % pattern.height
        case _:
            return 0, 0


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise unless a tensor has the dtype and the shape, in which None stands for any size."""
    fits = len(shape) == tensor.ndim and all(w in (None, g) for w, g in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        found = ", ".join(str(size) for size in tensor.shape)
        raise FormatError(f"{name} should be {_short(dtype)} [{wanted}], got {_short(tensor.dtype)} [{found}].")


def _check_offsets(offsets: NDArray[np.int64], total: int, what: str) -> None:
    if not offsets.size:
        if total:
            raise FormatError(f"there are {total} {what}, but no row for them.")
        return
    if offsets[0] != 0:
        raise FormatError(f"row_offsets start at {offsets[0]}; they should start at 0.")
    if (falls := np.flatnonzero(offsets[1:] < offsets[:-1])).size:
        row = int(falls[0])
        raise FormatError(f"row_offsets fall from {offsets[row]} at row {row} to {offsets[row + 1]} at row {row + 1}.")
    if offsets[-1] > total:
        raise FormatError(f"row_offsets reach {offsets[-1]}, but there are {total} {what}.")


def _check_ascending(
    name: str, indices: NDArray[np.int32], limit: int, starts: NDArray[np.int64] | None = None
) -> None:
    """Raise unless indices are within [0, limit) and ascend, anew from each of ``starts`` on."""
    if (outside := np.flatnonzero((indices < 0) | (indices >= limit))).size:
        raise FormatError(f"{name} names {indices[outside[0]]}, but there are {limit}.")
    fine = indices[1:] > indices[:-1]
    if starts is not None:
        fine[starts[(starts > 0) & (starts < len(indices))] - 1] = True
    if (falls := np.flatnonzero(~fine)).size:
        at = int(falls[0])
        raise FormatError(f"{name} has {indices[at + 1]} after {indices[at]}; it should ascend.")
