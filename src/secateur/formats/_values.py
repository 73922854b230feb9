"""The types that stored values may have, and the one place that rounds weights to int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._errors import FormatError, RecipeError
from secateur._types import dtype_name


@dataclass(frozen=True)
class ValueType:
    """How stored values may be represented.

    Args:
        dtype: of the tensor of values.
        code: its number in native code, ``native/``.
        scaled: whether a weight is the value times a scale of its output row.
        carrier: dtype that holds every value exactly and that PyTorch can index and pad, for arranging values.
    """

    dtype: torch.dtype
    code: int
    scaled: bool = False
    carrier: torch.dtype | None = None


# The one table of value types.
VALUE_TYPES = {
    value_type.dtype: value_type
    for value_type in (
        ValueType(torch.float32, 0),
        ValueType(torch.bfloat16, 1),
        ValueType(torch.float16, 3),
        ValueType(torch.int8, 2, scaled=True, carrier=torch.float16),
    )
}
VALUE_DTYPES = tuple(VALUE_TYPES)
UNSCALED_DTYPES = tuple(dtype for dtype, value_type in VALUE_TYPES.items() if not value_type.scaled)
_INT8_LIMIT = 127  # -128 is left unused, so that the code is symmetric


def is_scaled(dtype: torch.dtype) -> bool:
    """Return whether stored values of a dtype are codes that a scale for each row turns into weights."""
    return dtype in VALUE_TYPES and VALUE_TYPES[dtype].scaled


def as_value_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype for stored values, given it or its name; None for None.

    Raises:
        RecipeError: values cannot be stored in it.
    """
    names = {dtype_name(dtype): dtype for dtype in VALUE_DTYPES}
    if given is None or given in VALUE_DTYPES:
        return given
    if isinstance(given, str) and given in names:
        return names[given]
    raise RecipeError(f"value_dtype must be one of {', '.join(names)}, got {given!r}.")


def encode(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a weight ``[out, in]`` in a value dtype, and the scale of each row, float32 ``[out]``, if it has scales.

    Raises:
        FormatError: no such value dtype, or a weight that it cannot hold.
    """
    if dtype not in VALUE_TYPES:
        raise FormatError(
            f"values can be stored as {', '.join(map(dtype_name, VALUE_TYPES))}; got {dtype_name(dtype)}.\n"
            "Say which with value_dtype=torch.float32, for example."
        )
    if dtype == kept.dtype:
        return kept, None
    if VALUE_TYPES[dtype].scaled:
        return _quantize_rows(kept)
    values = kept.to(dtype)
    _refuse(kept.isfinite() & ~values.isfinite(), kept, f"is beyond the range of {dtype_name(dtype)}")
    return values, None


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of a weight ``[out, in]``, and the scale ``max |w| / 127`` of each row."""
    _refuse(~weight.isfinite(), weight, "has no int8 code")
    wide = weight.float()
    _refuse(~wide.isfinite(), weight, "is beyond the range of float32, in which scales are kept")
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scales = (largest / _INT8_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)  # tiny weights would divide by zero
    scales = torch.where(largest > 0, scales, 1.0)
    codes = (wide / scales[:, None]).round().clamp(-_INT8_LIMIT, _INT8_LIMIT)
    return codes.to(torch.int8), scales


def _refuse(bad: Tensor, values: Tensor, why: str) -> None:
    if bool(bad.any()):
        row, column = (int(index) for index in bad.nonzero()[0])
        value = float(values[row, column])
        raise FormatError(f"the weight {value:g} at row {row}, column {column} {why}. Use value_dtype=torch.float32.")
