"""The layout of all weights in 4 bits, in panels of 16 rows, and its route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur._types import Mask, Weight
from secateur.formats import GRIDS
from secateur.kernels._int4 import Int4Layout, Int4Route, round_groups, weight_sums
from secateur.kernels._int8 import check_columns
from secateur.kernels._layout import in_large_pages, padded

_ROWS, _GROUP = 16, 64
_PAIRS, _BYTES = 8, 4  # pairs of words of a group, and columns of a word
_ADDED = 8  # to each code, so that it has no sign


@dataclass(frozen=True, eq=False)
class Int4PanelLayout(Int4Layout):
    """All weights, zeros as well, in panels of 16 rows: two words of four neighbours of a row lie in four bytes."""

    scales: Tensor  # [panels, groups, 16] float16
    kernel = "int4_panels"

    @classmethod
    def pack(cls, weight: Weight, mask: Mask | None = None) -> Int4PanelLayout:
        """Pack a weight ``[out, in]``, zero where a mask prunes.

        Raises:
            KernelError: more than 65,536 columns.
        """
        codes, scales, _ = round_groups(weight, mask)
        return cls.of(codes, scales)

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> Int4PanelLayout:
        """Return the layout of codes int8 ``[out, in]`` and scales of groups."""
        check_columns(codes.shape[1])
        wide = (padded(codes, _ROWS, _GROUP) + _ADDED).to(torch.uint8)
        # [panel, row, group, pair, half, byte]
        words = wide.view(-1, _ROWS, wide.shape[1] // _GROUP, _PAIRS, 2, _BYTES)
        both = words[:, :, :, :, 0] | (words[:, :, :, :, 1] << 4)
        values = in_large_pages(both.permute(0, 2, 3, 1, 4))
        ordered = padded(scales, _ROWS, 1).view(-1, _ROWS, scales.shape[1]).transpose(1, 2).contiguous()
        return cls((codes.shape[0], codes.shape[1]), values, None, weight_sums(codes, scales), ordered)

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        halves = torch.stack([self.values & 15, self.values >> 4], dim=3)  # [panel, group, pair, half, row, byte]
        codes = halves.permute(0, 4, 1, 2, 3, 5).reshape(-1, self.values.shape[1] * _GROUP)[:rows, :columns]
        scales = self.scales.transpose(1, 2).reshape(-1, self.scales.shape[1])[:rows]
        return (codes.to(torch.int8) - _ADDED) * GRIDS["int4"].spread(scales, columns)

    def arguments(self) -> tuple[int, ...]:
        return self.scales.data_ptr(), self.sums.data_ptr()


@dataclass(frozen=True)
class Int4PanelRoute(Int4Route):
    """Run :class:`Int4PanelLayout`."""

    name: ClassVar[str] = "int4-panels"

    def lay_out_groups(self, codes: Tensor, scales: Tensor, mask: Mask) -> Int4PanelLayout:
        """Return the layout of a weight."""
        return Int4PanelLayout.of(codes.where(mask, 0), scales)
