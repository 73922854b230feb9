"""The layout of n values for every m consecutive inputs, with 16 rows side by side, and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur._types import Mask, Weight
from secateur.formats import Format
from secateur.kernels._layout import SPARE, Layout, entries, in_large_pages, padded, prepare, shape_of
from secateur.kernels._route import LayoutRoute
from secateur.patterns import NM, SparsityPattern

_ROWS = 16  # of a panel, side by side: the widest vectors hold 16 float32


@dataclass(frozen=True, eq=False)
class GroupLayout(Layout):
    """n values for every m consecutive inputs: 16 rows side by side, the place of each value in 2 or 4 bits."""

    words: Tensor  # [panels, words, 16] int32
    n: int
    m: int
    kernel = "groups"

    @classmethod
    def pack(
        cls, weight: Weight, mask: Mask | None = None, *, n: int, m: int, value_dtype: torch.dtype = torch.float32
    ) -> GroupLayout:
        """Pack a weight ``[out, in]`` that keeps at most n of every m consecutive inputs.

        Raises:
            KernelError: n and m do not fit the weight, or a group keeps more.
        """
        values, mask, scale = prepare(weight, mask, value_dtype)
        shape = shape_of(values)
        if not 1 <= n <= m <= 16 or shape[1] % m:
            raise KernelError(
                f"{n}:{m} does not fit a weight of {shape[1]} inputs; groups need 1 <= n <= m <= 16 and a number of "
                "inputs that is a multiple of m. PanelLayout takes any weight."
            )
        values, mask = padded(values, _ROWS, 1), padded(mask, _ROWS, 1)
        groups, panels = shape[1] // m, mask.shape[0] // _ROWS
        by_group = mask.view(len(mask), groups, m)
        counts = by_group.sum(-1, dtype=torch.uint8)
        if bool((counts > n).any()):
            raise KernelError(
                f"a group of {m} inputs keeps {int(counts.max())} weights; {n}:{m} keeps at most {n}. "
                "Prune to that pattern first. PanelLayout takes any weight."
            )
        if bool((counts < n).any()):  # such a group also stores the zeros at its first free places
            free = ~by_group
            by_group = by_group | (free & (free.cumsum(2, dtype=torch.uint8) <= (n - counts)[..., None]))
        kept, place = entries(values, by_group)
        kept = kept.view(panels, _ROWS, groups, n).permute(0, 2, 3, 1).contiguous()
        place = (place.int() % m).view(panels, _ROWS, groups, n).permute(0, 2, 3, 1)
        bits, per_word = cls._word(m)
        # Sizes are named, not -1: PyTorch cannot find the size of a dimension of a weight without rows.
        if n <= per_word:
            together = per_word // n
            place = nn.functional.pad(place, (0, 0, 0, 0, 0, -groups % together))
            place = place.reshape(panels, -(-groups // together), together * n, _ROWS)
        else:
            words = groups * -(-n // per_word)
            place = nn.functional.pad(place, (0, 0, 0, -n % per_word)).reshape(panels, words, per_word, _ROWS)
        shifts = (np.arange(place.shape[2], dtype=np.uint32) * np.uint32(bits))[:, None]
        words = np.bitwise_or.reduce(place.numpy().astype(np.uint32) << shifts, axis=2)
        places = torch.from_numpy(np.ascontiguousarray(words).view(np.int32))
        return cls(shape, in_large_pages(kept, SPARE), scale, places, n, m)

    @staticmethod
    def _word(m: int) -> tuple[int, int]:
        """The bits of a place, and how many places a word has."""
        bits = 2 if m <= 4 else 4
        return bits, 32 // bits

    def to_dense(self) -> Weight:
        rows, columns = self.shape
        groups, panels = columns // self.m, -(-rows // _ROWS)
        bits, per_word = self._word(self.m)
        words = torch.from_numpy(self.words.numpy().view(np.uint32).astype(np.int64))
        place = (words[:, :, None] >> (torch.arange(per_word) * bits)[:, None]) & ((1 << bits) - 1)
        if self.n <= per_word:
            together = per_word // self.n
            place = place[:, :, : together * self.n].reshape(panels, place.shape[1] * together, self.n, _ROWS)
            place = place[:, :groups]
        else:
            place = place.reshape(panels, groups, -(-self.n // per_word) * per_word, _ROWS)[:, :, : self.n]
        kept = self.values[:-SPARE].view(panels, groups, self.n, _ROWS).float()
        weight = kept.new_zeros(panels, groups, self.m, _ROWS).scatter_add_(2, place, kept)
        return self._scaled(weight.permute(0, 3, 1, 2).reshape(panels * _ROWS, columns)[:rows])

    def arguments(self) -> tuple[int, ...]:
        return self.words.data_ptr(), self.n, self.m


# A group that keeps fewer than n weights stores zeros. With more than this many stored values for each kept weight, the
# bitmask or panels are smaller and faster.
_MOST_STORED = 1.3


@dataclass(frozen=True)
class GroupRoute(LayoutRoute):
    """Run :class:`GroupLayout`.

    Args:
        n: values stored for each group.
        m: consecutive inputs of a group.
    """

    name: ClassVar[str] = "groups"
    grammar: ClassVar[str] = r"([1-9]\d?):([1-9]\d?)"
    separator: ClassVar[str] = ":"

    n: int
    m: int

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """One for each N:M pattern that the zeros satisfy, unless it would store many zeros."""
        columns = packed.shape[1]
        return [
            cls(pattern.n, pattern.m)
            for pattern in patterns
            if isinstance(pattern, NM)
            and pattern.n
            and pattern.m <= 16
            and columns % pattern.m == 0
            and pattern.n / pattern.m <= _MOST_STORED * density
        ]

    def why_not(self, packed: Format) -> str | None:
        """Every group must keep at most n weights."""
        if not 1 <= self.n <= self.m <= 16 or packed.shape[1] % self.m:
            return f"{self.n}:{self.m} does not fit a weight of {packed.shape[1]} inputs"
        kept = packed.mask().unflatten(1, (-1, self.m)).sum(2)
        if kept.numel() and int(kept.max()) > self.n:
            return f"a group of {self.m} inputs keeps {int(kept.max())} weights, more than {self.n}"
        return None

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight."""
        return GroupLayout.pack(values, mask, value_dtype=values.dtype, n=self.n, m=self.m)
