"""A weight as its format stores it, and a weight made ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import VALUE_TYPES, Bitmask, Format
from secateur.kernels._layout import Layout
from secateur.kernels._route import LayoutRoute


class Prepared(ABC):
    """A weight made ready for one route.

    Attributes:
        nbytes: of memory that it takes besides the tensors of the stored weight.
    """

    nbytes: int

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x ``[rows, in]`` and b ``[out]``, in x's dtype."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A matrix of stored values, to be run as it is or to be laid out.

    Args:
        values: ``[out, in]``, in a value dtype.
        scales: float32 ``[out]`` that int8 values are multiplied by; else None.
        owner: the format's own tensor of values. What has its bits in the same order shares its memory.
        mask: which values the format stores; None for all that are not zero.
    """

    values: Tensor
    scales: Tensor | None
    owner: Tensor
    mask: Mask | None = None

    @classmethod
    def of(cls, packed: Format) -> StoredWeight:
        """Return the weight in a format as a matrix."""
        values, scales = packed.unscaled()
        return cls(values, scales, packed.values, packed.mask() if isinstance(packed, Bitmask) else None)

    def to_dense(self) -> Weight:
        """Return the weight, scaled if it has scales; else these are the stored values themselves, not a copy."""
        return self.values if self.scales is None else self.values.float() * self.scales[:, None]

    def lay_out(self, route: LayoutRoute) -> tuple[Layout, int]:
        """Return the layout for a route, and the bytes of it that are the owner's own memory."""
        dtype = self.values.dtype
        values = self.values.to(VALUE_TYPES[dtype].carrier or dtype)
        # What a format stores only to fill its units need not run, unless its values are to be shared as they are.
        mask = self.mask if self.mask is not None and route.stores_zeros else self.values != 0
        layout = route.lay_out(values, mask)
        if self.scales is not None:
            scale = torch.nn.functional.pad(self.scales.cpu(), (0, layout.shape[0] - len(self.scales)))
            layout = layout.with_codes(dtype, scale)
        return _sharing(layout, self.owner)


def _sharing(layout: Layout, values: Tensor) -> tuple[Layout, int]:
    """The layout on the memory of stored values, where these are the same in the same order, and its shared bytes."""
    spare = layout.values.numel() - values.numel()
    beyond = values.untyped_storage().nbytes() // values.itemsize - values.storage_offset() - values.numel()
    if values.device.type != "cpu" or not values.is_contiguous() or not 0 <= spare <= beyond:
        return layout, 0
    whole = values.detach().as_strided((values.numel() + spare,), (1,))
    if not torch.equal(whole.view(torch.uint8), layout.values.view(torch.uint8)):
        return layout, 0
    return replace(layout, values=whole), whole.nbytes
