"""The choice of a format: the smallest one that can hold a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur._types import Mask, Weight
from secateur.formats._bitmask import Bitmask
from secateur.formats._format import Format, check_weight
from secateur.formats._nm import NMPacked
from secateur.formats._table import FORMATS
from secateur.patterns import NM, SparsityPattern, Unstructured, satisfied


def choose(pattern: SparsityPattern, mask: Mask, value_dtype: torch.dtype = torch.float32) -> type[Format] | None:
    """Return the smallest format for a mask.

    Of formats of the same size, the one that was made for the pattern is returned. The smallest format need not be the
    fastest: which kernel is fastest is measured later, on the machine that runs it.

    Args:
        pattern: the pattern that the mask follows.
        mask: ``[out, in]`` bool, True = kept.
        value_dtype: dtype of the values, and of the dense weight that the format is compared with.

    Returns:
        The format, or None where no format is smaller than the dense weight.

    Example:
        >>> import torch, secateur
        >>> from secateur.formats import choose
        >>> mask = secateur.NM(2, 4).mask(torch.rand(8, 64))
        >>> choose(secateur.NM(2, 4), mask).__name__, choose(secateur.Unstructured(), torch.ones(8, 64).bool())
        ('NMPacked', None)
    """
    best: type[Format] | None = None
    smallest = mask.numel() * value_dtype.itemsize
    # From the last format to the first, and only a strictly smaller one replaces the best. Bitmask takes any mask. The
    # formats after it say more about where the zeros are, which kernels can use.
    for format_type in reversed(FORMATS.values()):
        size = format_type.predicted_nbytes(mask, pattern, value_dtype)
        if size is not None and size < smallest:
            best, smallest = format_type, size
    return best


def pack(
    weight: Weight, value_dtype: torch.dtype | None = None, patterns: Sequence[SparsityPattern] | None = None
) -> Format:
    """Pack a dense weight in the smallest format for some patterns; in :class:`Bitmask` if none is smaller than dense.

    Args:
        weight: ``[out, in]``, floating point.
        value_dtype: dtype of the stored values; None for that of the weight.
        patterns: the patterns that the zeros follow; None to find them from the zeros.

    Raises:
        PatternError: the zeros do not follow the pattern.
        RecipeError: values cannot be stored in ``value_dtype``.
        FormatError: a weight that ``value_dtype`` cannot hold, or one on the meta device.
        TypeError: a weight that is not a dense floating-point tensor.

    Example:
        >>> import torch
        >>> from secateur.formats import pack
        >>> pack(torch.eye(64))
        NMPacked(64x64, 1:16, float32, 1,152 bytes)
    """
    check_weight(weight)
    mask = weight != 0
    dtype = weight.dtype if value_dtype is None else value_dtype
    format_type, pattern = smallest(mask, dtype, patterns)
    return format_type.from_dense(weight, mask, pattern, value_dtype)


def smallest(
    mask: Mask, dtype: torch.dtype, patterns: Sequence[SparsityPattern] | None
) -> tuple[type[Format], SparsityPattern]:
    """Return the format and the pattern that :func:`pack` takes for a mask; for the arguments see there.

    Raises:
        PatternError: the mask keeps more than an N:M pattern allows.
    """
    if patterns is None:
        patterns = satisfied(~mask)
    elif patterns and isinstance(patterns[0], NM) and NMPacked.predicted_nbytes(mask, patterns[0]) is None:
        NMPacked.from_dense(mask.float(), mask, patterns[0])  # raises: the message names the group
    best: tuple[int, type[Format], SparsityPattern] | None = None
    stored = int(mask.count_nonzero())
    # The zeros of an unstructured mask satisfy some wide N:M by chance, such as 15:16 at 50 %. A weight that was pruned
    # to N:M keeps exactly n of m weights. One that keeps fewer may satisfy N:M by chance. Such a pattern is tried last,
    # so that it is taken only if its format is strictly smaller than that of an unstructured mask.
    by_chance = [p for p in patterns if isinstance(p, NM) and (not stored or stored * p.m != mask.numel() * p.n)]
    for pattern in (*(p for p in patterns if p not in by_chance), Unstructured(), *by_chance):
        format_type = choose(pattern, mask, dtype)
        size = None if format_type is None else format_type.predicted_nbytes(mask, pattern, dtype)
        if format_type is not None and size is not None and (best is None or size < best[0]):
            best = size, format_type, pattern
    return (Bitmask, Unstructured()) if best is None else best[1:]


def made_for(pattern: SparsityPattern) -> type[Format]:
    """Return the format that is made for a pattern: the last that holds it, because Bitmask holds any."""
    return next(format_type for format_type in reversed(FORMATS.values()) if format_type.holds(pattern))


def stored_share(packed: Format) -> float:
    """Return how many weights are stored, as a fraction of all weights."""
    size = packed.shape[0] * packed.shape[1]
    return int(packed.mask().count_nonzero()) / size if size else 0.0
