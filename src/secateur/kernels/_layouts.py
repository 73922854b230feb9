"""How a sparse weight lies in memory while it runs: each layout is made from a dense weight for one kind of kernel.

A layout is for running, not for keeping: :mod:`secateur.formats` stores. Values are float32, bfloat16, float16 or int8
with one scale for each output row; sums are always float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.kernels._load import load

VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}

_SPARE = 16  # values readable past the end: the kernels load whole vectors
_LARGE = 4 << 20  # bytes from which large pages are asked for
_ROWS = 16  # side by side in a panel of lanes


def _prepared(weight: Weight, mask: Mask | None, value_dtype: torch.dtype) -> tuple[Tensor, Mask, Tensor | None]:
    """The weight in its value type, the mask, and the scales of int8."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.dim() != 2:
        raise KernelError(
            f"a weight of shape {tuple(weight.shape)} cannot be packed; kernels multiply a matrix [out, in]. "
            "Reshape a convolution's weight with flatten(1)."
        )
    if value_dtype not in VALUE_TYPES:
        raise TypeError(f"value_dtype must be one of {', '.join(map(str, VALUE_TYPES))}, got {value_dtype}")
    weight = weight.detach().to("cpu")
    mask = weight != 0 if mask is None else mask.detach().to("cpu")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise KernelError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, the weight has shape {tuple(weight.shape)}; a mask is "
            "bool and of the weight's shape. Pass mask=None to keep what is not zero."
        )
    if value_dtype != torch.int8:
        return weight.to(value_dtype).masked_fill(~mask, 0), mask, None
    weight = weight.float().masked_fill(~mask, 0)
    scale = weight.abs().amax(1) / 127 if weight.numel() else weight.new_zeros(weight.shape[0])
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), mask, scale


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros added below and on the right, up to multiples of rows and columns."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def settled(tensor: Tensor, spare: int = 0) -> Tensor:
    """A flat or whole copy, with `spare` zeros after it, in large pages where the system has them.

    A kernel streams through its weight once; large pages spare it the page walks, a sixth of the time of one input row.
    """
    settled = tensor.new_empty(tensor.numel() + spare)
    native = load()
    if settled.nbytes >= _LARGE and not isinstance(native, str):
        native.advise(settled.data_ptr(), settled.nbytes)
    settled[: tensor.numel()] = tensor.flatten()
    settled[tensor.numel() :] = 0
    return settled if spare else settled.view(tensor.shape)


def _offsets(counts: Tensor) -> Tensor:
    return nn.functional.pad(counts.flatten().to(torch.int64).cumsum(0), (1, 0))


def _as_bits(mask: Mask, dtype: Any, order: Any) -> Tensor:
    """The last dimension packed into words."""
    packed = np.packbits(mask.numpy(), axis=-1, bitorder=order)
    return torch.from_numpy(packed.view(dtype))


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """A weight [out, in] in the order in which a kernel reads it."""

    shape: tuple[int, int]
    values: Tensor
    scale: Tensor | None
    kernel: ClassVar[str]

    @abstractmethod
    def to_dense(self) -> Weight:
        """The weight, float32 [out, in], zeros where nothing is stored."""

    @abstractmethod
    def arguments(self) -> tuple[int, ...]:
        """What this kernel of the native module takes beyond the arguments that all of them share."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def _scaled(self, weight: Tensor) -> Weight:
        weight = weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]


@dataclass(frozen=True, eq=False)
class BitmaskLayout(Layout):
    """Rows of packed values and one bit for each column: for one input row, and for densities of a quarter and more."""

    mask: Tensor  # [out, ceil(in / 64)] int64, lowest bit first
    offsets: Tensor  # [out + 1] int64
    kernel = "bitmask"

    @classmethod
    def pack(
        cls, weight: Weight, mask: Mask | None = None, *, value_dtype: torch.dtype = torch.float32
    ) -> BitmaskLayout:
        """Pack what the mask keeps (default: what is not zero) of a weight [out, in]."""
        values, mask, scale = _prepared(weight, mask, value_dtype)
        words = _as_bits(_padded(mask, 1, 64), np.int64, "little")
        return cls(_shape(values), settled(values[mask], _SPARE), scale, words, _offsets(mask.sum(1)))

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        bits = np.unpackbits(self.mask.numpy().view(np.uint8), axis=-1, bitorder="little")[:, :columns]
        weight = self.values.new_zeros(rows, columns)
        weight[torch.from_numpy(bits).bool()] = self.values[:-_SPARE]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        return self.mask.data_ptr(), self.offsets.data_ptr()


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
        values, mask, scale = _prepared(weight, mask, value_dtype)
        shape = _shape(values)
        height = min(height, max(shape[0], 1))
        values, mask = _padded(values, height, width), _padded(mask, height, width)
        panels, blocks = mask.shape[0] // height, mask.shape[1] // width
        ordered = mask.view(panels, height, blocks, width).transpose(1, 2).contiguous()
        counts = ordered.sum(-1)
        columns = torch.arange(width, dtype=torch.int32).expand_as(ordered)[ordered].numpy()
        index = torch.from_numpy(columns.astype(np.uint8 if width <= 256 else np.uint16))
        kept = values.view(panels, height, blocks, width).transpose(1, 2)[ordered]
        small = torch.from_numpy(counts.numpy().astype(np.uint16))
        return cls(
            shape,
            settled(kept, _SPARE),
            scale,
            settled(index, _SPARE),
            small,
            _offsets(counts.sum(-1)),
            height,
            width,
        )

    def to_dense(self) -> Weight:
        _, blocks, height = self.counts.shape
        counts = torch.from_numpy(self.counts.numpy().astype(np.int64)).flatten()
        segment = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        row = segment // (blocks * height) * height + segment % height
        column = segment // height % blocks * self.width
        column += torch.from_numpy(self.index.numpy().astype(np.int64))[:-_SPARE]
        weight = self.values.new_zeros(self.shape)
        weight[row, column] = self.values[:-_SPARE]
        return self._scaled(weight)

    def arguments(self) -> tuple[int, ...]:
        addresses = (self.index.data_ptr(), self.counts.data_ptr(), self.offsets.data_ptr())
        return *addresses, self.height, self.width, self.index.element_size()


@dataclass(frozen=True, eq=False)
class LaneLayout(Layout):
    """n of every m consecutive inputs: 16 rows side by side, each value's place in its group in 2 or 4 bits."""

    words: Tensor  # [panels, words, 16] int32
    n: int
    m: int
    kernel = "lanes"

    @classmethod
    def pack(
        cls, weight: Weight, mask: Mask | None = None, *, n: int, m: int, value_dtype: torch.dtype = torch.float32
    ) -> LaneLayout:
        """Pack a weight [out, in] that keeps at most n of every m consecutive inputs."""
        values, mask, scale = _prepared(weight, mask, value_dtype)
        shape = _shape(values)
        if not 1 <= n <= m <= 16 or shape[1] % m:
            raise KernelError(
                f"{n}:{m} does not fit a weight of {shape[1]} inputs; lanes need 1 <= n <= m <= 16 and inputs that are "
                "a multiple of m. Use PanelLayout for any other structure."
            )
        values, mask = _padded(values, _ROWS, 1), _padded(mask, _ROWS, 1)
        groups, panels = shape[1] // m, mask.shape[0] // _ROWS
        by_group = mask.view(-1, groups, m)
        if bool((by_group.sum(-1) > n).any()):
            raise KernelError(
                f"a group of {m} inputs keeps {int(by_group.sum(-1).max())} values; {n}:{m} keeps at most {n}. "
                "Prune with that pattern first, or use PanelLayout."
            )
        place = torch.argsort(~by_group, dim=-1, stable=True)[..., :n]
        kept = values.view(-1, groups, m).gather(-1, place)
        kept = kept.view(panels, _ROWS, groups, n).permute(0, 2, 3, 1).contiguous()
        place = place.view(panels, _ROWS, groups, n).permute(0, 2, 3, 1)
        bits, per_word = cls._word(m)
        if n <= per_word:
            together = per_word // n
            place = nn.functional.pad(place, (0, 0, 0, 0, 0, -groups % together)).reshape(
                panels, -1, together * n, _ROWS
            )
        else:
            place = nn.functional.pad(place, (0, 0, 0, -n % per_word)).reshape(panels, -1, per_word, _ROWS)
        shifts = (torch.arange(place.shape[2]) * bits)[:, None]
        words = torch.from_numpy((place << shifts).sum(2).numpy().astype(np.uint32).view(np.int32))
        return cls(shape, settled(kept, _SPARE), scale, words, n, m)

    @staticmethod
    def _word(m: int) -> tuple[int, int]:
        """Bits of a place, places in a word."""
        bits = 2 if m <= 4 else 4
        return bits, 32 // bits

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        groups, panels = columns // self.m, -(-rows // _ROWS)
        bits, per_word = self._word(self.m)
        words = torch.from_numpy(self.words.numpy().view(np.uint32).astype(np.int64))
        place = (words[:, :, None] >> (torch.arange(per_word) * bits)[:, None]) & ((1 << bits) - 1)
        if self.n <= per_word:
            together = per_word // self.n
            place = place[:, :, : together * self.n].reshape(panels, -1, self.n, _ROWS)[:, :groups]
        else:
            place = place.reshape(panels, groups, -1, _ROWS)[:, :, : self.n]
        kept = self.values[:-_SPARE].view(panels, groups, self.n, _ROWS)
        weight = kept.new_zeros(panels, groups, self.m, _ROWS).scatter_add_(2, place, kept)
        return self._scaled(weight.permute(0, 3, 1, 2).reshape(-1, columns)[:rows])

    def arguments(self) -> tuple[int, ...]:
        return self.words.data_ptr(), self.n, self.m


@dataclass(frozen=True, eq=False)
class StripLayout(Layout):
    """Dense blocks of any size, cut into strips of 16, 8, 4, 2 or 1 rows whose sums stay in registers."""

    block_columns: Tensor  # [blocks] int32
    block_rows: Tensor  # [row blocks + 1] int64
    height: int
    width: int
    kernel = "strips"

    @classmethod
    def pack(
        cls,
        weight: Weight,
        mask: Mask | None = None,
        *,
        height: int,
        width: int,
        value_dtype: torch.dtype = torch.float32,
    ) -> StripLayout:
        """Pack a weight [out, in] by blocks: a block of which the mask keeps anything is stored whole."""
        values, mask, scale = _prepared(weight, mask, value_dtype)
        shape = _shape(values)
        if height < 1 or width < 1 or shape[0] % height or shape[1] % width:
            raise KernelError(
                f"blocks of {height}x{width} do not divide a weight of {shape[0]}x{shape[1]}; strips need whole "
                "blocks. Use PanelLayout for a weight with a remainder."
            )
        kept = mask.view(shape[0] // height, height, shape[1] // width, width).any(3).any(1)
        blocks = values.view(shape[0] // height, height, shape[1] // width, width).transpose(1, 2)[kept]
        row, column = kept.nonzero(as_tuple=True)
        layout = cls(shape, blocks, scale, column.to(torch.int32), _offsets(kept.sum(1)), height, width)
        flat = values.new_zeros(blocks.numel() + _SPARE)
        for target, first, strip in layout._strips(row):
            flat[target] = blocks[:, first : first + strip].transpose(1, 2).flatten(1)
        return cls(shape, settled(flat), scale, layout.block_columns, layout.block_rows, height, width)

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


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
