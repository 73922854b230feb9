"""The grids that weights are rounded to: what int8 and int4 can store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur._types import Weight, dtype_name

# How far beyond the last code the largest weight of a group may lie. It is clipped then, and the others are rounded
# more finely.
_CLIPPED = (1.1, 1.2, 1.3)
_AT_ONCE = 1 << 20  # weights, so that what is computed from them stays in the cache


@dataclass(frozen=True)
class Grid:
    """Whole multiples of a scale, one scale for each row, or for each row and group of columns.

    Codes are symmetrical, so that a weight and its negative have opposite codes, and zero is always on the grid.

    Args:
        limit: the largest code.
        dtype: of the scales.
        group: how many columns share a scale; None: all of them.
    """

    limit: int
    dtype: torch.dtype
    group: int | None = None

    def groups(self, columns: int) -> int:
        """Return how many scales a row of so many columns has."""
        return 1 if self.group is None else -(-columns // self.group)

    def scales(self, weight: Weight) -> Tensor:
        """Return the scales for a weight ``[out, in]``, ``[out, groups]`` in the grid's dtype, on its device.

        A row as a whole has ``max |w| / limit``. A group has the scale of the least squared error, among some that clip
        its largest weights and some with which its largest code is smaller than the limit: a group that has been
        rounded before keeps its weights. Zeros are exact with any scale, so that pruned weights do not count.

        Args:
            weight: finite.

        Raises:
            FormatError: a weight that needs a larger scale than the dtype holds.
        """
        rows, columns = weight.shape
        count, size = self.groups(columns), self.group or columns
        step = max(1, _AT_ONCE // max(1, count * size))
        found = weight.new_empty(rows, count, dtype=self.dtype)
        for start in range(0, rows, step):
            part = weight[start : start + step].float()
            self._refuse_large(part)
            part = torch.nn.functional.pad(part, (0, count * size - columns)).reshape(len(part) * count, size)
            chosen = self._row_scales(part) if self.group is None else self._group_scales(part)
            found[start : start + step] = chosen.view(found[start : start + step].shape)
        return found

    def codes(self, weight: Weight, scales: Tensor) -> Tensor:
        """Return the nearest codes, int8 ``[out, in]``.

        Args:
            weight: ``[out, in]``.
            scales: ``[out, groups]``.
        """
        return self._nearest(weight.float(), self.spread(scales, weight.shape[1])).to(torch.int8)

    def spread(self, scales: Tensor, columns: int) -> Tensor:
        """Return the scale of each weight, float32 ``[out, in]``, or ``[out, 1]`` where a row has one."""
        wide = scales.float()
        return wide if self.group is None else wide.repeat_interleave(self.group, 1)[:, :columns]

    def round(self, weight: Weight, steps: Tensor) -> Weight:
        """Return the nearest weights on the grid.

        Args:
            weight: of any shape.
            steps: the scale of each weight, as :meth:`spread` gives them, in the weight's dtype.
        """
        return self._nearest(weight, steps) * steps

    def _nearest(self, weight: Tensor, steps: Tensor) -> Tensor:
        return (weight / steps).round_().clamp_(-self.limit, self.limit)

    def _as_scale(self, scales: Tensor) -> Tensor:
        """A scale that the dtype holds: not zero, and in float32 not subnormal, which would lose bits."""
        known = torch.finfo(self.dtype)
        least = known.tiny if self.dtype == torch.float32 else known.smallest_normal * known.eps
        return scales.clamp(least, known.max).to(self.dtype).float()

    def _refuse_large(self, weight: Tensor) -> None:
        limit = torch.finfo(self.dtype).max
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if largest / self.limit > limit:
            raise FormatError(
                f"a weight of {largest:.3g} needs a scale of {largest / self.limit:.3g}, but a scale is "
                f"{dtype_name(self.dtype)}, at most {limit:.3g}.\nLeave the layer out, or round it to int8."
            )

    def _row_scales(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
        return torch.where(largest > 0, self._as_scale(largest / self.limit), 1.0)

    def _group_scales(self, groups: Tensor) -> Tensor:
        """The scale of the least squared error, of some that clip, and of those whose largest code is smaller."""
        largest = groups.abs().amax(1)
        best = self._as_scale(largest / self.limit)
        least = self._error(groups, best)

        def attempt(scale: Tensor, among: Tensor | None = None) -> None:
            error = self._error(groups if among is None else groups[among], scale)
            where = slice(None) if among is None else among
            better = error < least[where]
            best[where], least[where] = torch.where(better, scale, best[where]), torch.minimum(error, least[where])

        for clipped in _CLIPPED:
            attempt(self._as_scale(largest * (1 / (self.limit * clipped))))
        some = groups[:, :: max(1, groups.shape[1] // 8)]
        for code in range(1, self.limit):  # a group that is on a grid, but has no weight with the largest code
            scale = self._as_scale(largest / code)
            maybe = (self._error(some, scale) <= least).nonzero()[:, 0]
            attempt(scale[maybe], maybe)
        codes = self._nearest(groups, best[:, None])
        attempt(self._as_scale((groups * codes).sum(1) / codes.square().sum(1).clamp(min=1)))
        return torch.where(largest > 0, best, 1.0)

    def _error(self, groups: Tensor, scales: Tensor) -> Tensor:
        steps = scales[:, None]
        return self._nearest(groups, steps).mul_(steps).sub_(groups).square_().sum(1)


GRIDS = {"int8": Grid(127, torch.float32), "int4": Grid(7, torch.float16, 64)}


def int4_codes(weight: Weight, group: int = 64) -> tuple[Tensor, Tensor]:
    """Return the codes, int8 ``[out, in]`` from -7 to 7, and the scales, float16 ``[out, ceil(in / group)]``.

    Args:
        weight: ``[out, in]``, finite; the scale of a group must fit into float16.
        group: how many columns share a scale.
    """
    grid = Grid(GRIDS["int4"].limit, GRIDS["int4"].dtype, group)
    scales = grid.scales(weight)
    return grid.codes(weight, scales), scales
