"""A layout as one block of bytes, which the model file of another engine carries as a constant.

``native/engines/packed.cpp`` reads it, and docs/format.md describes it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.formats import VALUE_TYPES
from secateur.kernels._bitmask import BitmaskLayout
from secateur.kernels._groups import GroupLayout
from secateur.kernels._int8_bitmask import Int8BitmaskLayout
from secateur.kernels._int8_panels import Int8PanelLayout
from secateur.kernels._int8_tiles import Int8TileLayout
from secateur.kernels._layout import Layout
from secateur.kernels._panels import PanelLayout
from secateur.kernels._tiles import TileLayout

_MAGIC, _VERSION, _ALIGNMENT = b"SECATEUR", 1, 64
_MOST_SIZE = 1 << 24  # rows or columns, so that no product of sizes overflows in the reader


def to_bytes(layout: Layout) -> np.ndarray:
    """Return a layout as bytes, uint8 ``[n]``: a header of 128 bytes, and each tensor at a multiple of 64 bytes.

    Args:
        layout: a weight ``[out, in]`` in the order in which a kernel reads it.

    Raises:
        KernelError: the weight has no elements, or too many rows or columns.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> layout = kernels.PanelLayout.pack(torch.eye(4))
        >>> kernels.to_bytes(layout)[:8].tobytes()
        b'SECATEUR'
    """
    if not all(1 <= size <= _MOST_SIZE for size in layout.shape):
        raise KernelError(
            f"a weight of {layout.shape[0]}x{layout.shape[1]} cannot be put into the file of an engine; each size "
            f"should be from 1 to {_MOST_SIZE}. Leave this layer dense."
        )
    code, sizes, tensors = _parts(layout)
    header = [
        _VERSION,
        code,
        VALUE_TYPES[layout.values.dtype].code,
        *layout.shape,
        layout.values.numel(),
        int(layout.scale is not None),
        *sizes,
    ]
    numbers = np.zeros(15, "<i8")
    numbers[: len(header)] = header
    found = _MAGIC + numbers.tobytes()
    for tensor in (layout.values, layout.scale, *tensors):
        if tensor is not None:
            found += bytes(-len(found) % _ALIGNMENT) + _bytes_of(tensor)
    return np.frombuffer(found, np.uint8)


def _parts(layout: Layout) -> tuple[int, tuple[int, ...], tuple[Tensor, ...]]:
    """The number of a layout in the header, its sizes, and its tensors besides values and scale."""
    match layout:
        case BitmaskLayout():
            return 0, (), (layout.mask, layout.offsets)
        case PanelLayout():
            panel = (layout.height, layout.width, layout.index.element_size())
            return 1, panel, (layout.index, layout.counts, layout.offsets)
        case GroupLayout():
            return 2, (layout.n, layout.m), (layout.words,)
        case TileLayout():
            return 3, (layout.height, layout.width), (layout.first_tiles, layout.tile_columns)
        case Int8PanelLayout():
            return 4, (), (layout.sums,)
        case Int8TileLayout():
            tile = (layout.height, layout.width, layout.sections, layout.panel)
            return 5, tile, (layout.sums, layout.first_tiles, layout.places)
        case Int8BitmaskLayout():
            return 6, (), (layout.sums, layout.mask, layout.offsets)
        case _:
            raise KernelError(
                f"{type(layout).__name__} has no number in the file of an engine; those that have are BitmaskLayout, "
                "PanelLayout, GroupLayout, TileLayout and those of 8 bits. Use one of these."
            )


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
