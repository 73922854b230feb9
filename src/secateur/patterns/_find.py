"""Find the patterns that the zeros of a weight satisfy, where its pattern is not known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from secateur._errors import PatternError
from secateur.patterns._classes import NM, Block, Column, Row, TransposableNM
from secateur.patterns._pattern import SparsityPattern

# The sizes that hardware and kernels use. Any other size would cost time, and random zeros would match more of them.
_GROUPS = (2, 4, 8, 16)
_TILES = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 16), (16, 1), (1, 8), (8, 1), (1, 4), (4, 1))
_Tried: TypeAlias = int | tuple[int, int] | type[SparsityPattern]  # m of N:M, height and width of a tile, or a class
_ALL: tuple[_Tried, ...] = (*_GROUPS, *_TILES, Row, Column)
_FEW = 64  # rows, a multiple of every height


def satisfied(zero: Tensor) -> tuple[SparsityPattern, ...]:
    """Return the patterns that the zeros of a matrix (``[out, in]`` bool, True = zero) satisfy, N:M first."""
    # What a few rows do not satisfy the whole matrix does not either. Mostly they refute nearly all patterns.
    tried = tuple(_held(zero[:_FEW], _ALL)) if len(zero) > 2 * _FEW else _ALL
    found: list[SparsityPattern] = []
    if bool(zero.any()):
        for pattern in _held(zero, tried).values():
            if not any(_implies(stronger, pattern) for stronger in found):
                found.append(pattern)
    return tuple(found)


def _held(zero: Tensor, tried: Iterable[_Tried]) -> dict[_Tried, SparsityPattern]:
    """Those of some patterns that the zeros satisfy. Without a zero they satisfy all but N:M."""
    held: dict[_Tried, SparsityPattern] = {}
    zeros, (rows, columns) = int(zero.count_nonzero()), zero.shape
    counts = {1: zero.view(torch.uint8)}  # zeros in each group of 1, 2, 4, ... columns
    for one in tried:
        match one:
            case int(m) if columns % m == 0:
                n = m - int(_counts(counts, m).min()) if zero.numel() else m
                if n < m:
                    is_both = n > 0 and rows % m == 0 and _in_columns(zero, m) >= m - n
                    held[one] = TransposableNM(n, m) if is_both else NM(n, m)
            case (height, width) if rows % height == 0 and columns % width == 0:
                tiles = (_counts(counts, width) == width).unflatten(0, (-1, height)).all(1)
                if int(tiles.count_nonzero()) * height * width == zeros:
                    held[one] = Block(height, width)
            case type() if one is Row and int(zero.all(1).count_nonzero()) * columns == zeros:
                held[one] = Row()
            case type() if one is Column and int(zero.all(0).count_nonzero()) * rows == zeros:
                held[one] = Column()
    return held


def _counts(known: dict[int, Tensor], width: int) -> Tensor:
    """The zeros in each group of so many columns. Each count is the sum of two of the one before."""
    if width not in known:
        pairs = _counts(known, width // 2).unflatten(1, (-1, 2))
        known[width] = pairs[..., 0] + pairs[..., 1]
    return known[width]


def _in_columns(zero: Tensor, m: int) -> int:
    """The fewest zeros in a group of m rows of a column."""
    return int(zero.unflatten(0, (-1, m)).sum(1).min())


def _implies(one: SparsityPattern, other: SparsityPattern) -> bool:
    """Whether zeros that satisfy one pattern satisfy the other: 2:4 implies 4:8, and tiles imply smaller ones."""
    match one, other:
        case NM(n, m), NM():
            return type(other) in (NM, type(one)) and other.m % m == 0 and n * (other.m // m) <= other.n
        case Block(height, width), Block():
            return height % other.height == 0 and width % other.width == 0
    return False


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
    if isinstance(pattern, TransposableNM) and _in_columns(core, pattern.m) < pattern.m - pattern.n:
        return False
    return int(core.unflatten(1, (-1, pattern.m)).sum(2).min()) >= pattern.m - pattern.n
