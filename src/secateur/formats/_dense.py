"""The format of a weight without zeros: every weight is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur._types import Mask
from secateur.formats._arrays import as_array, as_tensor, expect
from secateur.formats._format import Format
from secateur.formats._halves import pack_halves, unpack_halves
from secateur.formats._values import INT4
from secateur.patterns import SparsityPattern, Unstructured


@final
@dataclass(frozen=True, eq=False, repr=False)
class DensePacked(Format):
    """Every weight in its place, for layers without zeros that run in fewer bits.

    It takes the dense bytes of its value dtype. A weight that a mask prunes is stored as ``+0.0``. So
    :func:`~secateur.formats.choose` never takes this format. ``pack_`` takes it for layers without zeros, where a
    ``precision`` or a ``tolerance`` is given.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, in]``. With int4: uint8
            ``[out, ceil(in / 2)]``, the lower half of a byte first, 8 added to each number.

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
    _int4_nbytes: ClassVar[staticmethod[[Mask], int] | None] = staticmethod(
        lambda mask: mask.shape[0] * -(-mask.shape[1] // 2)
    )

    def mask(self) -> Mask:
        return torch.ones(self.shape, dtype=torch.bool, device=self.values.device)

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        if scales is not None and scales.dim() == 2:
            stored = as_tensor(pack_halves(as_array(stored)), stored)
        return cls((mask.shape[0], mask.shape[1]), pattern, stored.contiguous(), scales)

    def _stored(self) -> Tensor:
        if self.value_dtype != INT4:
            return self.values
        return as_tensor(unpack_halves(as_array(self.values))[:, : self.shape[1]], self.values)

    def _check(self) -> None:
        rows, columns = self.shape
        if self.value_dtype != INT4:
            expect("values", self.values, self.values.dtype, self.shape)
            return
        expect("values", self.values, INT4, (rows, -(-columns // 2)))
        if columns % 2 and bool((self.values[:, -1] >> 4).any()):
            raise FormatError("values have a half beyond the last column that is not 0; it should be 0.")

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        return mask.numel(), 0, mask.shape[0]
