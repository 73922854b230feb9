"""The dtypes that stored values may have, and the rounding to int8 and int4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._checks import one_of
from secateur._errors import FormatError
from secateur._types import Weight, dtype_name
from secateur.formats._grid import GRIDS, int4_codes


@dataclass(frozen=True)
class ValueType:
    """A dtype of stored values.

    Args:
        dtype: dtype of the tensor of values.
        code: its number in native code, ``native/``.
        scaled: whether a weight is the value times a scale.
        grouped: whether each row has a scale for each group of columns, instead of one.
        called: its name in settings and reports; None for that of the dtype.
        carrier: a floating-point dtype that holds every value exactly. Layouts are made from a weight in this dtype,
            because they take only floating-point weights. None for floating-point values.
    """

    dtype: torch.dtype
    code: int
    scaled: bool = False
    carrier: torch.dtype | None = None
    grouped: bool = False
    called: str | None = None


INT4 = torch.uint8  # two numbers from -7 to 7 in a byte

# The one table of value types.
VALUE_TYPES = {
    value_type.dtype: value_type
    for value_type in (
        ValueType(torch.float32, 0),
        ValueType(torch.bfloat16, 1),
        ValueType(torch.float16, 3),
        ValueType(torch.int8, 2, scaled=True, carrier=torch.float16),
        ValueType(INT4, 4, scaled=True, grouped=True, called="int4"),
    )
}
VALUE_DTYPES = tuple(dtype for dtype in VALUE_TYPES if dtype != INT4)  # the ones that every format can hold
UNSCALED_DTYPES = tuple(dtype for dtype, value_type in VALUE_TYPES.items() if not value_type.scaled)


def is_scaled(dtype: torch.dtype) -> bool:
    """Return whether a weight is a stored value of this dtype times a scale."""
    return dtype in VALUE_TYPES and VALUE_TYPES[dtype].scaled


def value_name(dtype: torch.dtype) -> str:
    """Return the name of a value dtype in settings and reports, such as ``"int4"``."""
    called = VALUE_TYPES[dtype].called if dtype in VALUE_TYPES else None
    return called or dtype_name(dtype)


def dense_nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a weight ``[out, in]`` with all its zeros, in a value dtype; with int4, and its scales."""
    rows, columns = shape
    if dtype != INT4:
        return rows * columns * dtype.itemsize
    return rows * (-(-columns // 2) + 2 * GRIDS["int4"].groups(columns))


def as_value_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of stored values that a setting names; None for None.

    Args:
        given: a dtype, or its name such as ``"int8"``.

    Raises:
        RecipeError: values cannot be stored in it.
    """
    names = {value_name(dtype): dtype for dtype in VALUE_TYPES}
    if given is None:
        return None
    return names[one_of("value_dtype", value_name(given) if isinstance(given, torch.dtype) else given, names)]


def encode(kept: Weight, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Return a weight ``[out, in]`` in a value dtype, and the scale of each row, float32 ``[out]`` or None.

    With int4: codes from -7 to 7 as int8, and the scale of each row and group of 64 columns, float16 ``[out, groups]``.

    Args:
        kept: the weight, zero where it is pruned.
        dtype: one of ``VALUE_TYPES``; None for that of the weight.

    Raises:
        FormatError: a weight that the dtype cannot hold, or whose own dtype is none of them.
    """
    dtype = kept.dtype if dtype is None else dtype
    if dtype not in VALUE_TYPES:
        raise FormatError(
            f"the weight is {dtype_name(dtype)}, but values can be stored as "
            f"{', '.join(map(value_name, VALUE_TYPES))}. Give one of these as value_dtype."
        )
    if dtype == kept.dtype:
        return kept, None
    if kept.dtype.itemsize < 2:  # float8, for which PyTorch has no comparisons, and whose scale is elsewhere
        raise FormatError(f"the weight is {dtype_name(kept.dtype)}. Multiply it by its scale in float32 first.")
    if VALUE_TYPES[dtype].scaled:
        return _quantize_groups(kept) if VALUE_TYPES[dtype].grouped else _quantize_rows(kept)
    values = kept.to(dtype)
    _refuse(kept.isfinite() & ~values.isfinite(), kept, f"is beyond the range of {dtype_name(dtype)}")
    return values, None


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes of a weight ``[out, in]``, and the scale ``max |w| / 127`` of each row."""
    wide = weight.float()
    if wide.numel() and not all(bool(bound.isfinite()) for bound in wide.aminmax()):  # faster than to look at each
        _refuse(~weight.isfinite(), weight, "has no int8 code")
        _refuse(~wide.isfinite(), weight, "is beyond the range of float32, in which scales are kept")
    scales = GRIDS["int8"].scales(wide)
    return GRIDS["int8"].codes(wide, scales), scales[:, 0]


def _quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int4 codes of a weight ``[out, in]``, and the scales ``[out, groups]``."""
    _refuse(~weight.isfinite(), weight, "has no int4 code")
    most = GRIDS["int4"].limit * torch.finfo(torch.float16).max
    _refuse(weight.abs() > most, weight, "is beyond the range of the float16 scales of int4")
    return int4_codes(weight)


def _refuse(bad: Tensor, values: Tensor, why: str) -> None:
    """Raise, naming the first value that is bad, if there is one."""
    if bool(bad.any()):
        row, column = (int(index) for index in bad.nonzero()[0])
        value = float(values[row, column])
        raise FormatError(f"the weight {value:g} at row {row}, column {column} {why}. Use value_dtype=torch.float32.")
