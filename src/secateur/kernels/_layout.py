"""Layouts: how a sparse weight lies in memory while a kernel runs it. Each kernel has its layout.

A layout is made from a dense weight, and is never written to a file; :mod:`secateur.formats` does that. Values have one
of the value dtypes of the formats, int8 with one scale for each output row. Sums are always float32.
"""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from secateur._errors import PatternError
from secateur._types import Mask, Weight
from secateur.formats import as_value_dtype, check_mask, check_weight, encode

# Zeros after the last value. A kernel loads whole vectors of up to 16 values, and the last one may start at any value:
# without these it would read memory that is not the weight's.
SPARE = 16
SPARE_BYTES = 64  # the same where a vector has so many values
# Zeros after the values of a packed layer. A layout that has the same values in the same order finds its spare values
# here, and so needs no copy. More than SPARE, for layouts that end with further zeros.
_SPARE_OF_LAYERS = 64
_PAGE = 2 << 20  # bytes of a large page
_WORTH = 2 * _PAGE // 3  # used bytes from which on one is asked for: the others are wasted


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """A weight ``[out, in]`` in the order in which a kernel reads it.

    Args:
        shape: ``(out, in)`` of the weight.
        values: the stored weights, and at least 16 zeros after them.
        scale: float32 ``[out]`` for int8 values; else None.
    """

    shape: tuple[int, int]
    values: Tensor
    scale: Tensor | None
    kernel: ClassVar[str]  # the name of its kernel in the native module

    @abstractmethod
    def to_dense(self) -> Weight:
        """Return the weight, float32 ``[out, in]``, zero where nothing is stored."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x ``[rows, in]``, float32, by PyTorch alone. The weight is made dense at each call."""
        return nn.functional.linear(x.float(), self.to_dense().to(x.device), None if bias is None else bias.float())

    @abstractmethod
    def arguments(self) -> tuple[int, ...]:
        """Return the arguments of this kernel in the native module, beyond those that every kernel takes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def with_codes(self, dtype: torch.dtype, scale: Tensor) -> Self:
        """Return the layout with its values, which are integers, in an integer dtype, and the scale of each row."""
        return replace(self, values=self.values.to(dtype), scale=scale.float().cpu())

    def _scaled(self, weight: Tensor) -> Weight:
        weight = weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]


def prepare(weight: Weight, mask: Mask | None, value_dtype: torch.dtype) -> tuple[Tensor, Mask, Tensor | None]:
    """Return a weight in a value dtype, zero where the mask prunes; the mask; and the scales of int8 values.

    Args:
        weight: ``[out, in]``, floating point.
        mask: ``[out, in]`` bool, True = kept; None keeps what is not zero.
        value_dtype: one of the value dtypes of the formats.

    Raises:
        PatternError: the weight is not a matrix, or the mask has another shape.
        RecipeError: values cannot be stored in ``value_dtype``.
        FormatError: a weight that ``value_dtype`` cannot hold.
        TypeError: a weight that is not a floating-point tensor, or a mask that is not a bool tensor.
    """
    check_weight(weight)
    if weight.dim() != 2:
        raise PatternError(
            f"a weight of shape {tuple(weight.shape)} cannot be packed; kernels multiply a matrix [out, in]. "
            "Reshape a convolution's weight with flatten(1)."
        )
    weight = weight.detach().to("cpu")
    mask = weight != 0 if mask is None else check_mask(mask, weight).detach().to("cpu")
    values, scale = encode(torch.where(mask, weight, weight.new_zeros(())), as_value_dtype(value_dtype))
    return values, mask, scale


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix with zeros added below and on the right, so that its sizes are multiples of rows and columns."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def in_large_pages(tensor: Tensor, spare: int = 0) -> Tensor:
    """Return a copy of a tensor in large pages, where the system has them.

    A kernel reads its whole weight once for each call. With large pages the processor looks up fewer addresses, which
    saves a quarter of the time for one input row.

    Args:
        tensor: to copy.
        spare: zeros to add after the values. If there are any, the copy is flat.
    """
    copied = _empty(tensor.numel() + spare, tensor.dtype)
    copied[: tensor.numel()] = tensor.flatten()
    copied[tensor.numel() :] = 0
    return copied if spare else copied.view(tensor.shape)


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor whose values are not set yet."""
    size = count * dtype.itemsize
    pages, rest = divmod(size, _PAGE)
    large = pages + (rest >= _WORTH)
    if not large or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    # Memory of its own, because the system gives large pages only from one of their borders on, where memory begins
    # whose size is a multiple of theirs. What is not used of it takes no memory.
    memory = mmap.mmap(-1, (pages + bool(rest)) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE, 0, large * _PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)


def with_spare_values(values: Tensor) -> Tensor:
    """Return a copy of stored values with zeros after them in memory.

    A layout that has the same values in the same order can then use this memory instead of a copy.
    """
    if values.device.type != "cpu":
        return values.detach()
    return in_large_pages(values.detach().flatten(), _SPARE_OF_LAYERS)[: values.numel()].view(values.shape)


def entries(matrix: Tensor, kept: Mask) -> tuple[Tensor, Tensor]:
    """Return the entries of a tensor where a mask is True, in their order, and the place of each, int64.

    Indexing by the mask takes 20 times as long.
    """
    places = torch.from_numpy(np.flatnonzero(kept.numpy()))
    return torch.take(matrix, places), places


def offsets_of(counts: Tensor) -> Tensor:
    """Return where each part starts and where the last one ends, int64, given the size of each part."""
    return nn.functional.pad(counts.flatten().to(torch.int64).cumsum(0), (1, 0))


def as_bits(mask: Mask, dtype: Any, order: Any) -> Tensor:
    """Return a mask as bits, packed into words along the last dimension."""
    packed = np.packbits(mask.numpy(), axis=-1, bitorder=order)
    return torch.from_numpy(packed.view(dtype))


def bits_of(mask: Mask) -> Tensor:
    """Return the rows of a mask as words, int64 ``[out, ceil(in / 64)]``, the lowest bit first."""
    return in_large_pages(as_bits(padded(mask, 1, 64), np.int64, "little"))


def kept_of(bits: Tensor, columns: int) -> Mask:
    """Return the mask ``[out, in]`` whose rows are words."""
    found = np.unpackbits(bits.numpy().view(np.uint8), axis=-1, bitorder="little")[:, :columns]
    return torch.from_numpy(found).bool()


def shape_of(matrix: Tensor) -> tuple[int, int]:
    """Return the two sizes of a matrix."""
    return matrix.shape[0], matrix.shape[1]
