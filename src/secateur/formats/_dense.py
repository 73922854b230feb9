"""The format of a weight without zeros: every weight is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from secateur._types import Mask
from secateur.formats._arrays import expect
from secateur.formats._format import Format
from secateur.patterns import SparsityPattern, Unstructured


@final
@dataclass(frozen=True, eq=False, repr=False)
class DensePacked(Format):
    """Every weight in its place, for layers without zeros that run in fewer bits.

    It takes the dense bytes of its value dtype. A weight that a mask prunes is stored as ``+0.0``. So
    :func:`~secateur.formats.choose` never takes this format. ``pack_`` takes it for layers without zeros, where a
    ``precision`` or a ``tolerance`` is given.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, in]``.

    Example:
        >>> import torch
        >>> from secateur.formats import DensePacked
        >>> DensePacked.from_dense(torch.ones(8, 64), value_dtype=torch.int8)
        DensePacked(8x64, unstructured, int8, 544 bytes)
    """

    name: ClassVar[str] = "dense"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (Unstructured,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales")
    _default: ClassVar[SparsityPattern | None] = Unstructured()

    def mask(self) -> Mask:
        return torch.ones(self.shape, dtype=torch.bool, device=self.values.device)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        return cls((mask.shape[0], mask.shape[1]), pattern, stored.contiguous(), scales)

    def _stored(self) -> Tensor:
        return self.values

    def _check(self) -> None:
        expect("values", self.values, self.values.dtype, self.shape)

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        return mask.numel(), 0, mask.shape[0]
