"""A weight as its format stores it, and a weight that is ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import INT4, VALUE_TYPES, Bitmask, Format
from secateur.kernels._int4 import Int4Route
from secateur.kernels._int8 import Int8Route
from secateur.kernels._layout import Layout
from secateur.kernels._route import LayoutRoute
from secateur.kernels._window import Window


class Prepared(ABC):
    """A weight that is ready to run by one route.

    Attributes:
        nbytes: bytes of memory that it takes besides the tensors of the stored weight.
        any_shape: whether inputs may be ``[..., in]``, which saves two views around a small product.
    """

    nbytes: int
    any_shape: ClassVar[bool] = False

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x ``[rows, in]`` and b ``[out]``, in the dtype of x."""

    def convolve(self, x: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        """Return the convolution of x ``[images, channels, height, width]`` plus b ``[out]``, in the dtype of x.

        It is a product with what each output pixel reads. A kernel that takes images as they lie does without the copy.
        The result has the memory format that ``nn.Conv2d`` gives it.
        """
        y = self.run(window.rows(x), bias).view(len(x), *window.outputs(*x.shape[2:]), -1).permute(0, 3, 1, 2)
        return y if in_channels_last(x) else y.contiguous()


def in_channels_last(x: Tensor) -> bool:
    """Return whether images lie in memory as ``[images, height, width, channels]``, and not as their sizes say."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A stored weight as a matrix, from which a layout can be made.

    Args:
        values: ``[out, in]``, in a value dtype.
        scales: float32 ``[out]``, by which int8 values are multiplied; else None.
        owner: the tensor of values of the format. A layout with the same values in the same order shares its memory.
        mask: ``[out, in]`` bool, which values the format stores; None for all that are not zero.
        groups: for int4 values their codes, int8 ``[out, in]``, and the scales of groups; else None. The values are the
            weights then, in float32.
    """

    values: Tensor
    scales: Tensor | None
    owner: Tensor
    mask: Mask | None = None
    groups: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, packed: Format) -> StoredWeight:
        """Return the weight in a format as a matrix."""
        values, scales = packed.unscaled()
        groups = packed.grouped() if packed.value_dtype == INT4 else None
        return cls(values, scales, packed.values, packed.mask() if isinstance(packed, Bitmask) else None, groups)

    def to_dense(self) -> Weight:
        """Return the weight: times its scales, or the stored values themselves if there are none."""
        return self.values if self.scales is None else self.values.float() * self.scales[:, None]

    def lay_out(self, route: LayoutRoute) -> tuple[Layout, int]:
        """Return the layout for a route, and how many of its bytes are the owner's memory."""
        if isinstance(route, Int4Route) and self.groups is not None:
            codes, group_scales = (part.cpu() for part in self.groups)
            stored = self.mask if self.mask is not None and route.stores_zeros else codes != 0
            return _sharing(route.lay_out_groups(codes, group_scales, stored.cpu()), self.owner)
        if isinstance(route, Int8Route):
            return _sharing(self._lay_out_codes(route), self.owner)
        dtype = self.values.dtype
        values = self.values.to(VALUE_TYPES[dtype].carrier or dtype)
        # Formats also store zeros, to fill a group or a tile. They need not be multiplied. But a layout that shares the
        # memory of the values must have all of them.
        mask = self.mask if self.mask is not None and route.stores_zeros else self.values != 0
        layout = route.lay_out(values, mask)
        if self.scales is not None:
            scale = torch.nn.functional.pad(self.scales.cpu(), (0, layout.shape[0] - len(self.scales)))
            layout = layout.with_codes(dtype, scale)
        return _sharing(layout, self.owner)

    def _lay_out_codes(self, route: Int8Route) -> Layout:
        """The layout for a route in 8 bits: of the stored codes, or of values that are rounded for it."""
        mask = self.mask if self.mask is not None and route.stores_zeros else self.values != 0
        if self.scales is None:
            return route.lay_out(self.values.float().cpu(), mask.cpu())
        return route.lay_out_codes(self.values.cpu(), self.scales.cpu(), mask.cpu())


def _sharing(layout: Layout, values: Tensor) -> tuple[Layout, int]:
    """The layout on the memory of stored values, if these are the same in the same order, and the shared bytes.

    A packed layer would otherwise take twice the memory of its values: once as they are stored and once to run.
    """
    spare = layout.values.numel() - values.numel()
    beyond = values.untyped_storage().nbytes() // values.itemsize - values.storage_offset() - values.numel()
    if values.device.type != "cpu" or not values.is_contiguous() or not 0 <= spare <= beyond:
        return layout, 0
    whole = values.detach().as_strided((values.numel() + spare,), (1,))
    if not torch.equal(whole.view(torch.uint8), layout.values.view(torch.uint8)):
        return layout, 0
    return replace(layout, values=whole), whole.nbytes
