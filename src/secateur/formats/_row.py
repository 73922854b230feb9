"""The format of rows: each row that keeps a weight is stored whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from secateur._types import Mask
from secateur.formats._arrays import as_array, check_ascending, expect
from secateur.formats._format import Format
from secateur.patterns import Row, SparsityPattern


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowPacked(Format):
    """Each row that keeps a weight, stored whole, and its index.

    It takes the density of the dense bytes, and 4 bytes for each stored row.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[kept, in]``, scales ``[kept]``.
        rows: int32 ``[kept]``, ascending.
    """

    name: ClassVar[str] = "row"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (Row,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales", "rows")
    _default: ClassVar[SparsityPattern | None] = Row()
    _scaled_rows: ClassVar[str | None] = "rows"

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

    def _check(self) -> None:
        expect("values", self.values, self.values.dtype, (None, self.shape[1]))
        expect("rows", self.rows, torch.int32, (self.values.shape[0],))
        check_ascending("rows", as_array(self.rows), self.shape[0])

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        kept = int(mask.any(1).count_nonzero())
        return kept * mask.shape[1], 4 * kept, kept
