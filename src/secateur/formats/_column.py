"""The format of columns: each column that keeps a weight is stored whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from secateur._types import Mask
from secateur.formats._arrays import as_array, check_ascending, expect
from secateur.formats._format import Format
from secateur.patterns import Column, SparsityPattern


@final
@dataclass(frozen=True, eq=False, repr=False)
class ColumnPacked(Format):
    """Each column that keeps a weight, stored whole, and its index.

    It takes the density of the dense bytes, and 4 bytes for each stored column.

    Args:
        shape, pattern, values, scales: see :class:`Format`; values are ``[out, kept]``.
        columns: int32 ``[kept]``, ascending. Each is a single column, even if a channel of the pattern has several.
    """

    name: ClassVar[str] = "column"
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]] = (Column,)
    names: ClassVar[tuple[str, ...]] = ("values", "scales", "columns")
    _layout: ClassVar[torch.layout] = torch.sparse_csc
    _default: ClassVar[SparsityPattern | None] = Column()

    columns: Tensor

    def mask(self) -> Mask:
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask[:, self.columns.long()] = True
        return mask

    @classmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        kept = mask.any(0).nonzero().flatten()
        values = stored.index_select(1, kept).contiguous()
        return cls((mask.shape[0], mask.shape[1]), pattern, values, scales, kept.int())

    def _stored(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        dense[:, self.columns.long()] = self.values
        return dense

    def _check(self) -> None:
        expect("values", self.values, self.values.dtype, (self.shape[0], None))
        expect("columns", self.columns, torch.int32, (self.values.shape[1],))
        check_ascending("columns", as_array(self.columns), self.shape[1])

    @classmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        kept = int(mask.any(0).count_nonzero())
        return kept * mask.shape[0], 4 * kept, mask.shape[0]
