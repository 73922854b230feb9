"""How a sparse weight lies in memory while it runs: each layout is made from a dense weight for one kernel.

A layout is for running, not for keeping: :mod:`secateur.formats` stores. Values have one of the value types of the
formats, int8 with one scale for each output row; sums are always float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import VALUE_TYPES, encode
from secateur.kernels._load import load

SPARE = 16  # values readable past the end: the kernels load whole vectors
_SPARE_OF_LAYERS = 64  # behind the values of a packed layer; more than any layout wants
_LARGE = 4 << 20  # bytes from which large pages are asked for


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """A weight ``[out, in]`` in the order in which a kernel reads it.

    Args:
        shape: ``(out, in)`` of the weight.
        values: stored weights, and at least 16 zeros behind them.
        scale: float32 ``[out]`` for int8 values; else None.
    """

    shape: tuple[int, int]
    values: Tensor
    scale: Tensor | None
    kernel: ClassVar[str]  # its name in the native module

    @abstractmethod
    def to_dense(self) -> Weight:
        """Return the weight, float32 ``[out, in]``, zeros where nothing is stored."""

    @abstractmethod
    def arguments(self) -> tuple[int, ...]:
        """Return what this kernel of the native module takes beyond the arguments that all of them share."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def with_codes(self, dtype: torch.dtype, scale: Tensor) -> Self:
        """Return the layout with its values, which are codes, in their own dtype, and the scale of each row."""
        return replace(self, values=self.values.to(dtype), scale=scale.float().cpu())

    def _scaled(self, weight: Tensor) -> Weight:
        weight = weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]


def prepare(weight: Weight, mask: Mask | None, value_dtype: torch.dtype) -> tuple[Tensor, Mask, Tensor | None]:
    """Return the weight in its value type, zero where the mask prunes, the mask, and the scales of int8."""
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
    values, scale = encode(weight.masked_fill(~mask, 0), value_dtype)
    return values, mask, scale


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix with zeros added below and on the right, up to multiples of rows and columns."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def in_large_pages(tensor: Tensor, spare: int = 0) -> Tensor:
    """Return a copy in large pages where the system has them: flat, with ``spare`` zeros after it, if any are asked.

    A kernel streams through its weight once; large pages spare it the page walks, a sixth of the time of one input row.
    """
    copied = tensor.new_empty(tensor.numel() + spare)
    native = load()
    if copied.nbytes >= _LARGE and not isinstance(native, str):
        native.advise(copied.data_ptr(), copied.nbytes)
    copied[: tensor.numel()] = tensor.flatten()
    copied[tensor.numel() :] = 0
    return copied if spare else copied.view(tensor.shape)


def with_spare_values(values: Tensor) -> Tensor:
    """Return a copy of stored values with zeros behind it in memory, on which a layout in the same order can lie."""
    if values.device.type != "cpu":
        return values.detach()
    return in_large_pages(values.detach().flatten(), _SPARE_OF_LAYERS)[: values.numel()].view(values.shape)


def offsets_of(counts: Tensor) -> Tensor:
    """Return where each part starts, given how many there are in each, and where the last one ends: int64."""
    return nn.functional.pad(counts.flatten().to(torch.int64).cumsum(0), (1, 0))


def as_bits(mask: Mask, dtype: Any, order: Any) -> Tensor:
    """Return the last dimension packed into words."""
    packed = np.packbits(mask.numpy(), axis=-1, bitorder=order)
    return torch.from_numpy(packed.view(dtype))


def shape_of(matrix: Tensor) -> tuple[int, int]:
    """Return the two sizes of a matrix."""
    return matrix.shape[0], matrix.shape[1]
