"""How one weight of a model is packed: in the format that its zeros ask for, or whole."""

from __future__ import annotations

import torch

from secateur._types import Weight
from secateur.formats import DensePacked, Format, pack
from secateur.kernels import PRECISIONS, RoutePlan
from secateur.packing._history import patterns_of
from secateur.packing._settings import PackSettings
from secateur.patterns import SparsityPattern

NO_ZEROS = "no zeros"  # the reason why a layer is left alone


def pack_weight(
    weight: Weight, known: SparsityPattern | None, settings: PackSettings
) -> tuple[Format, tuple[SparsityPattern, ...], bool] | None:
    """Return a weight in its format, the patterns that its zeros satisfy, and whether these were found from the zeros.

    Args:
        weight: ``[out, in]``.
        known: the pattern that it was pruned to, or None.
        settings: how to pack.

    Returns:
        None if it has no zeros, and layers without zeros are left alone.

    Raises:
        FormatError: a value that cannot be stored in the dtype that the settings ask for.
    """
    if not settings.takes_whole and not bool((weight == 0).any()):
        return None
    patterns, found = patterns_of(weight, known)
    return packed_as(weight, patterns, settings.stored, settings.takes_whole), patterns, found and bool(patterns)


def packed_as(
    weight: Weight, patterns: tuple[SparsityPattern, ...], dtype: torch.dtype | None, takes_whole: bool
) -> Format:
    """Return a weight in the smallest format for the patterns of its zeros, in a dtype.

    Args:
        weight: ``[out, in]``.
        patterns: that its zeros satisfy.
        dtype: of stored values; None for that of the weight.
        takes_whole: whether a weight that no format makes smaller is stored whole, and not as a bitmask.

    Raises:
        FormatError: a value that cannot be stored in the dtype.
    """
    packed = pack(weight, dtype, patterns)
    if takes_whole and packed.nbytes >= weight.numel() * packed.value_dtype.itemsize + _scales(packed):
        return DensePacked.from_dense(weight, torch.ones_like(weight, dtype=torch.bool), None, dtype)
    return packed


def _scales(packed: Format) -> int:
    return 0 if packed.scales is None else 4 * packed.shape[0]


def packed_again(packed: Format, weight: Weight, settings: PackSettings) -> Format:
    """Return a weight that is packed already in the dtype that the settings ask for.

    Args:
        packed: the weight.
        weight: the same, dense.
        settings: how to pack.

    Raises:
        FormatError: a value that cannot be stored in the dtype.
    """
    if settings.stored in (None, packed.value_dtype):
        return packed
    if isinstance(packed, DensePacked):
        return DensePacked.from_dense(weight, packed.mask(), packed.pattern, settings.stored)
    return pack(weight, settings.stored)


def precisions_of(plan: RoutePlan, stored: Format, settings: PackSettings) -> tuple[str, ...]:
    """Return the arithmetic that a layer may have that is packed already: its own, unless the settings ask for another.

    Args:
        plan: how it runs.
        stored: its weight as it is stored now.
        settings: how to pack.
    """
    if settings.is_asked or settings.stored not in (None, stored.value_dtype):
        return settings.precisions
    return tuple(precision for precision in PRECISIONS if precision in {route.precision for route in plan.routes})
