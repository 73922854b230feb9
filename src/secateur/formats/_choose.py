"""The one place that chooses a format: the smallest that holds a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur._types import Mask, Weight
from secateur.formats._bitmask import Bitmask
from secateur.formats._format import Format
from secateur.formats._nm import NMPacked
from secateur.formats._table import FORMATS
from secateur.patterns import NM, SparsityPattern, Unstructured, satisfied


def choose(pattern: SparsityPattern, mask: Mask, value_dtype: torch.dtype = torch.float32) -> type[Format] | None:
    """Return the smallest format for a mask; of equals, one that was made for the pattern.

    Which is fastest is another question, that only the machine answers.

    Args:
        pattern: that the mask follows.
        mask: ``[out, in]`` bool, True = kept.
        value_dtype: of the values, and of the dense weight to compare with.

    Returns:
        The format, or None where none is smaller than the dense weight in the same dtype.

    Example:
        >>> import torch, secateur
        >>> from secateur.formats import choose
        >>> mask = secateur.NM(2, 4).mask(torch.rand(8, 64))
        >>> choose(secateur.NM(2, 4), mask).__name__, choose(secateur.Unstructured(), torch.ones(8, 64).bool())
        ('NMPacked', None)
    """
    best: type[Format] | None = None
    smallest = mask.numel() * value_dtype.itemsize
    for format_type in reversed(FORMATS.values()):
        size = format_type.predicted_nbytes(mask, pattern, value_dtype)
        if size is not None and size < smallest:
            best, smallest = format_type, size
    return best


def pack(
    weight: Weight, value_dtype: torch.dtype | None = None, patterns: Sequence[SparsityPattern] | None = None
) -> Format:
    """Pack a dense weight in the smallest of the formats for some patterns; :class:`Bitmask` where none is smaller.

    Args:
        weight: ``[out, in]``.
        value_dtype: of the stored values; None for the weight's own.
        patterns: that its zeros follow; None finds them.

    Raises:
        PatternError: the zeros do not follow the pattern.
        FormatError: a value that ``value_dtype`` cannot hold.

    Example:
        >>> import torch
        >>> from secateur.formats import pack
        >>> pack(torch.eye(64))
        NMPacked(64x64, 1:16, float32, 1,152 bytes)
    """
    mask = weight != 0
    if patterns is None:
        patterns = satisfied(~mask)
    elif patterns and isinstance(patterns[0], NM) and NMPacked.predicted_nbytes(mask, patterns[0]) is None:
        return NMPacked.from_dense(weight, mask, patterns[0], value_dtype)  # raises, naming the group
    dtype = weight.dtype if value_dtype is None else value_dtype
    best: tuple[int, type[Format], SparsityPattern] | None = None
    stored = int(mask.count_nonzero())
    # Random zeros fit some wide N:M by chance: that is no pattern's doing unless its format is smaller.
    by_chance = [p for p in patterns if isinstance(p, NM) and (not stored or stored * p.m != mask.numel() * p.n)]
    for pattern in (*(p for p in patterns if p not in by_chance), Unstructured(), *by_chance):
        format_type = choose(pattern, mask, dtype)
        size = None if format_type is None else format_type.predicted_nbytes(mask, pattern, dtype)
        if format_type is not None and size is not None and (best is None or size < best[0]):
            best = size, format_type, pattern
    format_type, pattern = (Bitmask, Unstructured()) if best is None else best[1:]
    return format_type.from_dense(weight, mask, pattern, value_dtype)


def stored_share(packed: Format) -> float:
    """Return stored weights over all weights, 0 to 1."""
    size = packed.shape[0] * packed.shape[1]
    return int(packed.mask().count_nonzero()) / size if size else 0.0
