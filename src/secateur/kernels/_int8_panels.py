"""The layout of all weights as bytes, in panels of 16 rows, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import Format
from secateur.kernels._int8 import MOST_COLUMNS, Int8Layout, Int8Route, check_columns, round_weight
from secateur.kernels._layout import in_large_pages, padded
from secateur.patterns import SparsityPattern

_ROWS, _BYTES = 16, 4  # of a panel, and of a word


@dataclass(frozen=True, eq=False)
class Int8PanelLayout(Int8Layout):
    """All weights as bytes, zeros as well, in panels of 16 rows: four neighbours of a row lie together."""

    kernel = "int8_panels"

    @classmethod
    def pack(cls, weight: Weight, mask: Mask | None = None) -> Int8PanelLayout:
        """Pack a weight ``[out, in]``, zero where a mask prunes.

        Raises:
            KernelError: more than 65,536 columns.
        """
        codes, _, scale = round_weight(weight, mask)
        return cls.of(codes, scale)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> Int8PanelLayout:
        """Return the layout of codes int8 ``[out, in]`` with a scale for each row."""
        check_columns(codes.shape[1])
        rows, columns = codes.shape
        wide = padded(codes, _ROWS, _BYTES)
        ordered = wide.view(-1, _ROWS, wide.shape[1] // _BYTES, _BYTES).transpose(1, 2)
        sums = codes.sum(1, dtype=torch.int32)
        return cls((rows, columns), in_large_pages(ordered), scale.float(), sums)

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        return self._scaled(self.values.transpose(1, 2).reshape(-1, self.values.shape[1] * _BYTES)[:rows, :columns])

    def arguments(self) -> tuple[int, ...]:
        return (self.sums.data_ptr(),)


@dataclass(frozen=True)
class Int8PanelRoute(Int8Route):
    """Run :class:`Int8PanelLayout`."""

    name: ClassVar[str] = "int8-panels"

    @classmethod
    def fits(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Always one, so that each weight whose sums fit has a route in 8 bits."""
        return [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits whose sums fit 32 bits."""
        return None if packed.shape[1] <= MOST_COLUMNS else f"it has more than {MOST_COLUMNS:,} inputs"

    def lay_out_codes(self, codes: Tensor, scale: Tensor, mask: Mask) -> Int8PanelLayout:
        """Return the layout of a weight."""
        return Int8PanelLayout.of(codes, scale)
