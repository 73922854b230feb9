"""The choice of a format: the smallest one that can hold a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur._types import Mask, Weight
from secateur.formats._arrays import check_weight
from secateur.formats._bitmask import Bitmask
from secateur.formats._format import Format
from secateur.formats._nm import NMPacked
from secateur.formats._table import FORMATS
from secateur.formats._values import dense_nbytes
from secateur.patterns import NM, SparsityPattern, Unstructured, along_rows, satisfied


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
    found = _smallest_for(pattern, mask, value_dtype)
    return None if found is None else found[1]


def _smallest_for(pattern: SparsityPattern, mask: Mask, dtype: torch.dtype) -> tuple[int, type[Format]] | None:
    """The bytes of the smallest format for a mask, and the format; None where none is smaller than dense."""
    best: tuple[int, type[Format]] | None = None
    smallest = dense_nbytes((mask.shape[0], mask.shape[1]), dtype)
    # From the last format to the first, and only a strictly smaller one replaces the best. Bitmask takes any mask. The
    # formats after it say more about where the zeros are, which kernels can use.
    for format_type in reversed(FORMATS.values()):
        size = format_type.predicted_nbytes(mask, pattern, dtype)
        if size is not None and size < smallest:
            best, smallest = (size, format_type), size
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
    given = satisfied(~mask) if patterns is None else patterns
    is_given, patterns = patterns is not None, [along_rows(pattern, len(mask)) for pattern in given]
    if is_given and patterns and isinstance(patterns[0], NM) and NMPacked.predicted_nbytes(mask, patterns[0]) is None:
        NMPacked.from_dense(mask.float(), mask, patterns[0])  # raises: the message names the group
    best: tuple[int, type[Format], SparsityPattern] | None = None
    stored = int(mask.count_nonzero())
    # The zeros of an unstructured mask satisfy some wide N:M by chance, such as 15:16 at 50 %. A weight that was pruned
    # to N:M keeps exactly n of m weights. One that keeps fewer may satisfy N:M by chance. Such a pattern is tried last,
    # so that it is taken only if its format is strictly smaller than that of an unstructured mask.
    by_chance = [p for p in patterns if isinstance(p, NM) and (not stored or stored * p.m != mask.numel() * p.n)]
    for pattern in (*(p for p in patterns if p not in by_chance), Unstructured(), *by_chance):
        if best is not None and pattern in by_chance and _least(pattern, mask, dtype) >= best[0]:
            continue  # Bitmask was tried; and whether each group has the zeros would take long to see
        found = _smallest_for(pattern, mask, dtype)
        if found is not None and (best is None or found[0] < best[0]):
            best = *found, pattern
    return (Bitmask, Unstructured()) if best is None else best[1:]


def _least(pattern: SparsityPattern, mask: Mask, dtype: torch.dtype) -> int:
    """The fewest bytes that the format made for an N:M pattern takes: those of its values."""
    assert isinstance(pattern, NM)
    return mask.numel() * pattern.n // pattern.m * dtype.itemsize


def made_for(pattern: SparsityPattern) -> type[Format]:
    """Return the format that is made for a pattern: the last that holds it, because Bitmask holds any."""
    return next(format_type for format_type in reversed(FORMATS.values()) if format_type.holds(pattern))


def stored_share(packed: Format) -> float:
    """Return how many weights are stored, as a fraction of all weights."""
    size = packed.shape[0] * packed.shape[1]
    values = [tensor for name, tensor in packed.tensors().items() if name in packed.value_names]
    if any(tensor.dtype == torch.uint8 for tensor in values):  # which hold several values in a byte
        return int(packed.mask().count_nonzero()) / size if size else 0.0
    return sum(tensor.numel() for tensor in values) / size if size else 0.0
