"""Tensors as numpy arrays of their bits and back, and the checks that several formats share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur._types import Mask, Weight, dtype_name

NO_VALUES = "the packed weight is on the meta device, without values. Load its values first."
MAX_SIDE = 2**31 - 1  # indices are int32
# Far above any layer. Without a limit, a file of a few bytes could make its reader allocate any amount of memory.
MAX_WEIGHTS = 2**36
MAX_EMPTY_SIDE = 2**20  # beside a side of 0, where no byte of the file stands for the rows or columns
_MAX_DIMENSIONS = 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor as an array of integers; uint8 and bool as they are.

    numpy has no bfloat16, and integers copy every NaN exactly.
    """
    if tensor.is_meta:
        raise FormatError(NO_VALUES)
    tensor = tensor.detach().cpu().contiguous()
    as_it_is = tensor.dtype in (torch.uint8, torch.bool)
    array: NDArray[Any] = (tensor if as_it_is else tensor.view(_INTEGERS[tensor.dtype.itemsize])).numpy()
    return array


def as_tensor(array: NDArray[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an array as a tensor on the device of ``like``, with its bits read as ``dtype`` if one is given."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor if dtype is None else tensor.view(dtype)).to(like.device)


def entries(matrix: NDArray[Any], kept: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the entries of a matrix where a mask is True, row by row. Indexing by the mask takes 20 times as long."""
    return matrix.ravel().take(np.flatnonzero(kept))


def starts_of(kept: Any) -> NDArray[np.int64]:
    """Return how many entries of a bool matrix are True in the rows before each row."""
    counts = np.count_nonzero(kept, axis=1)
    starts: NDArray[np.int64] = np.cumsum(counts) - counts
    return starts


def population(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how many bits are set in each row of bytes."""
    # numpy can count bits only from version 2 on. Here pairs, then groups of four bits, then bytes are added up.
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts: NDArray[np.int64] = ((nibbles + (nibbles >> 4)) & 0x0F).sum(1, dtype=np.int64)
    return counts


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise unless a tensor has the dtype and the shape. None in the shape stands for any size."""
    fits = len(shape) == tensor.ndim and all(w in (None, g) for w, g in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        found = ", ".join(str(size) for size in tensor.shape)
        raise FormatError(f"{name} should be {dtype_name(dtype)} [{wanted}], got {dtype_name(tensor.dtype)} [{found}].")


def check_offsets(offsets: NDArray[np.int64], total: int, what: str) -> None:
    """Raise unless offsets start at 0, do not fall and do not exceed the total."""
    if not offsets.size:
        if total:
            raise FormatError(f"there are {total} {what}, but no row has them.")
        return
    if offsets[0] != 0:
        raise FormatError(f"row_offsets start at {offsets[0]}; they should start at 0.")
    if (falls := np.flatnonzero(offsets[1:] < offsets[:-1])).size:
        row = int(falls[0])
        raise FormatError(f"row_offsets fall from {offsets[row]} at row {row} to {offsets[row + 1]} at row {row + 1}.")
    if offsets[-1] > total:
        raise FormatError(f"row_offsets reach {offsets[-1]}, but there are {total} {what}.")


def check_ascending(name: str, indices: NDArray[np.int32], limit: int, starts: NDArray[np.int64] | None = None) -> None:
    """Raise unless indices are in [0, limit) and ascend. After each of ``starts`` they begin again."""
    if (outside := np.flatnonzero((indices < 0) | (indices >= limit))).size:
        raise FormatError(f"{name} has the index {indices[outside[0]]}; it should be 0 to {limit - 1}.")
    ascends = indices[1:] > indices[:-1]
    if starts is not None:
        ascends[starts[(starts > 0) & (starts < len(indices))] - 1] = True
    if (falls := np.flatnonzero(~ascends)).size:
        at = int(falls[0])
        raise FormatError(f"{name} has {indices[at + 1]} after {indices[at]}; it should ascend.")


def check_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return a shape from a file as two sizes.

    Raises:
        FormatError: not two sizes, a negative one, or more weights than a format may have.
    """
    sizes = tuple(shape)
    if len(sizes) != 2 or any(type(size) is not int for size in sizes):
        raise FormatError(f"the shape should be two integers (out, in), got {str(sizes)[:200]}.")
    rows, columns = check_sizes(sizes)
    return rows, columns


def check_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a tensor from a file, of any number of dimensions.

    Raises:
        FormatError: a size that is no integer, negative or too large, or more elements than a format may have.
    """
    sizes = tuple(shape)
    if any(type(size) is not int for size in sizes) or len(sizes) > _MAX_DIMENSIONS:
        raise FormatError(f"the shape should be integers, at most {_MAX_DIMENSIONS} of them, got {str(sizes)[:200]}.")
    elements = math.prod(sizes)
    most = MAX_SIDE if elements else MAX_EMPTY_SIDE
    if min(sizes, default=0) < 0 or max(sizes, default=0) > most or elements > MAX_WEIGHTS:
        raise FormatError(
            f"the shape {'x'.join(map(str, sizes))[:200]} is out of range: a size is 0 to {MAX_SIDE} (beside one of 0, "
            f"to {MAX_EMPTY_SIDE}), and a weight has up to {MAX_WEIGHTS} elements."
        )
    return sizes


def check_weight(weight: Weight) -> None:
    """Raise unless a weight is a dense tensor of floating-point values.

    Raises:
        FormatError: it is on the meta device.
        TypeError: another layout or dtype, or no tensor.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = dtype_name(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"a weight must be a floating-point tensor, got {found}")
    if weight.is_nested or weight.layout is not torch.strided:
        found = "a nested tensor" if weight.is_nested else f"one of layout {weight.layout}"
        raise TypeError(f"a weight must be a dense tensor, got {found}. Call .to_dense() first")
    if weight.is_meta:
        raise FormatError("the weight is on the meta device, without values. Load its values first.")


def check_mask(mask: Mask, weight: Weight) -> Mask:
    """Return the mask of a weight.

    Raises:
        PatternError: another shape than the weight.
        TypeError: not a bool tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = dtype_name(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"a mask must be a bool tensor, got {found}")
    if mask.shape != weight.shape:
        raise PatternError(
            f"the mask has shape {tuple(mask.shape)}, but the weight has shape {tuple(weight.shape)}. "
            "Give a mask of the weight's shape, or None to keep what is not zero."
        )
    return mask
