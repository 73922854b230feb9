"""Units: what is kept or pruned together in a matrix of one shape, and which units compete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._errors import PatternError
from secateur._types import Mask, Scores


@dataclass(frozen=True)
class Units:
    """The units of a pattern in a matrix of one shape.

    The core of the matrix consists of whole tiles of the pattern. The remainder to the right of it and below stays
    dense. The core is cut into units of ``height x width`` elements, numbered row by row. Each competition has the same
    number of consecutive units.

    Args:
        shape: ``(out, in)`` of the matrix.
        core: rows and columns of the part that is cut into units.
        height: rows of a unit.
        width: columns of a unit.
        competitions: how many there are.
        count: units in each competition.

    Example:
        >>> import torch, secateur
        >>> units = secateur.Block(1, 2, remainder="dense").units((2, 5))
        >>> units.core, units.competitions, units.count, units.size
        ((2, 4), 1, 4, 2)
        >>> units.scores(torch.tensor([[3.0, 4.0, 0.0, 1.0, 9.0], [1.0, 1.0, 2.0, 0.0, 9.0]])).tolist()
        [[25.0, 1.0, 2.0, 4.0]]
        >>> units.mask(torch.tensor([[True, False, False, True]])).int().tolist()
        [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    """

    shape: tuple[int, int]
    core: tuple[int, int]
    height: int
    width: int
    competitions: int
    count: int

    @property
    def size(self) -> int:
        """Elements of a unit."""
        return self.height * self.width

    @property
    def total(self) -> int:
        """Units of all competitions."""
        return self.competitions * self.count

    def crop(self, matrix: Tensor) -> Tensor:
        """Return the core of a matrix of this shape: a view, or the matrix itself where there is no remainder."""
        return matrix if self.core == self.shape else matrix[: self.core[0], : self.core[1]]

    def elements(self, core: Tensor) -> Tensor:
        """Return the elements of a core as ``[competitions, count, size]``; a view where possible."""
        if self.size == 1:
            return core.reshape(self.competitions, self.count, 1)
        down, across = self._grid()
        tiles = core.reshape(down, self.height, across, self.width).transpose(1, 2)
        units: Tensor = tiles.flatten(2).flatten(0, 1).unflatten(0, (self.competitions, self.count))
        return units

    def scores(self, scores: Scores) -> Tensor:
        """Return the scores of the units, ``[competitions, count]``, given those of all elements, ``[out, in]``.

        A unit of one element has its score. A larger one has the sum of the squares, each with the sign of its score.
        """
        elements = self.elements(self.crop(scores))
        if self.size == 1:
            return elements[..., 0]
        parts = elements.flatten(0, 1).split(max(1, _PART // max(1, self.size)))
        return torch.cat([_sum_of_squares(part) for part in parts]).view(self.competitions, self.count)

    def spread(self, values: Tensor) -> Tensor:
        """Return a core in which every element has the value of its unit in ``[competitions, count]``."""
        if self.size == 1:
            return values.view(self.core)
        down, across = self._grid()
        tiles = values.view(down, 1, across, 1).expand(-1, self.height, -1, self.width)
        return tiles.reshape(self.core).contiguous()

    def mask(self, keep: Tensor) -> Mask:
        """Return the mask ``[out, in]`` that keeps the units in ``[competitions, count]`` bool, and the remainder."""
        core = self.spread(keep)
        if self.core == self.shape:
            return core
        mask = torch.ones(self.shape, dtype=torch.bool, device=keep.device)
        mask[: self.core[0], : self.core[1]] = core
        return mask

    def _grid(self) -> tuple[int, int]:
        """Units down and across the core. A side without elements, in an empty matrix, has one unit."""
        return self.core[0] // self.height if self.height else 1, self.core[1] // self.width if self.width else 1


# Elements whose squares are computed at a time: their float64 copies stay in the cache, and below 2^15 elements PyTorch
# adds up every unit in one thread, in the same order whatever the number of units.
_PART = 2**14


def _sum_of_squares(elements: Tensor) -> Tensor:
    """The score of each unit: the sum of its elements' squares, with their signs, over the last dimension.

    Squares are float64, in which those of float32 scores neither overflow nor vanish. The elements of a unit are
    contiguous, so that all units are added up in the same order and equal units have exactly equal scores.
    """
    wide = elements.double().contiguous()
    sums = (wide * wide.abs()).sum(-1)
    if not sums.is_meta and sums.isnan().any():  # squares of opposite sign, each beyond the largest float64
        raise PatternError("the scores are too large: their squares overflow float64. Scale them down.")
    return sums
