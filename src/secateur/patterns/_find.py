"""Find the patterns that the zeros of a weight satisfy, where its pattern is not known."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._errors import PatternError
from secateur.patterns._classes import NM, Block, Column, Row
from secateur.patterns._pattern import SparsityPattern

# The sizes that hardware and kernels use. Any other size would cost time, and random zeros would match more of them.
_GROUPS = (2, 4, 8, 16)
_WIDTHS = (2, 4, 8, 16, 32)  # of groups and tiles
_TILES = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 16), (16, 1), (1, 8), (8, 1), (1, 4), (4, 1))


def satisfied(zero: Tensor) -> tuple[SparsityPattern, ...]:
    """Return the patterns that the zeros of a matrix (``[out, in]`` bool, True = zero) satisfy, N:M first."""
    found: list[SparsityPattern] = []
    zeros, (rows, columns) = int(zero.count_nonzero()), zero.shape
    if not zeros:
        return ()
    # Zeros in each group of 1, 2, 4, ... columns. Each count is the sum of two of the one before.
    counts = {1: zero.view(torch.uint8)}
    for m in _WIDTHS:
        if columns % m == 0:
            pairs = counts[m // 2].unflatten(1, (-1, 2))
            counts[m] = pairs[..., 0] + pairs[..., 1]
    for m in _GROUPS:
        if m in counts:
            n = m - int(counts[m].min())
            # 2:4 implies 4:8, so 4:8 is left out where 2:4 was found.
            implied = any(isinstance(p, NM) and m % p.m == 0 and p.n * (m // p.m) <= n for p in found)
            if n < m and not implied:
                found.append(NM(n, m))
    for height, width in _TILES:
        if rows % height == 0 and width in counts:
            tiles = (counts[width] == width).unflatten(0, (-1, height)).all(1)
            implied = any(isinstance(p, Block) and p.height % height == 0 and p.width % width == 0 for p in found)
            if int(tiles.count_nonzero()) * height * width == zeros and not implied:
                found.append(Block(height, width))
    if int(zero.all(1).count_nonzero()) * columns == zeros:
        found.append(Row())
    if int(zero.all(0).count_nonzero()) * rows == zeros:
        found.append(Column())
    return tuple(found)


def may_come_from(zero: Tensor, pattern: SparsityPattern) -> bool:
    """Return whether a matrix that was pruned to a pattern may have these zeros.

    A weight that was pruned to a pattern has all zeros of the pattern, and may have further ones. Only N:M fixes how
    many zeros there are at least.

    Args:
        zero: ``[out, in]`` bool, True = zero.
        pattern: to compare with.
    """
    try:
        core = pattern.units(zero.shape).crop(zero)
    except PatternError:
        return False
    if not isinstance(pattern, NM) or not core.numel():
        return True
    return int(core.unflatten(1, (-1, pattern.m)).sum(2).min()) >= pattern.m - pattern.n
