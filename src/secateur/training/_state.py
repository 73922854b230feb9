"""Is a state what ``state_dict`` returned? Every check, so that nothing is replaced by a state that is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur._types import Mask, dtype_name
from secateur.patterns import NM, SparsityPattern

_DEEPEST = 8  # levels of plain values


def check_keys(state: object, expected: Iterable[str]) -> Mapping[str, Any]:
    """Return a state if it is a mapping that has all these keys.

    Raises:
        FormatError: naming what is missing.
    """
    if not isinstance(state, Mapping):
        raise FormatError(f"the state should be a mapping, but is a {type(state).__name__}. Restore the checkpoint.")
    if missing := [key for key in expected if key not in state]:
        raise FormatError(f"the state is incomplete: {missing} are missing. Restore the checkpoint.")
    return state


def check_step(step: object) -> int:
    """Return a step if it is an integer that is not negative."""
    if type(step) is not int or not 0 <= step < 2**63:
        raise FormatError(
            f"the step should be an int of at least 0 and of 64 bits, got {_shown(step)}. Restore the checkpoint."
        )
    return step


def check_plain(what: str, value: object) -> None:
    """Raise unless a value is made of mappings, lists, texts, numbers, bools and None."""
    if not _is_plain(value, _DEEPEST):
        raise FormatError(f"the {what} should be plain values, as in JSON, but is not. Restore the checkpoint.")


def check_generator(state: object) -> None:
    """Raise unless this is the state of a generator of random numbers on the CPU."""
    try:
        torch.Generator().set_state(state)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise FormatError(
            f"the state of the generator is not one: {str(error).splitlines()[0]}. Restore the checkpoint."
        ) from None


def check_shape(shape: object) -> tuple[int, ...]:
    """Return a shape if it is a list of sizes."""
    if not isinstance(shape, list | tuple) or any(type(side) is not int for side in shape):
        raise FormatError(f"the shape should be a list of sizes, got {_shown(shape)}. Restore the checkpoint.")
    return tuple(shape)


def check_mask(mask: object, shape: Sequence[int], pattern: SparsityPattern) -> None:
    """Raise unless this is None or a mask of a shape, legal under a pattern or on the way to it."""
    if mask is None:
        return
    _check_tensor("mask", mask, shape, torch.bool)
    assert isinstance(mask, Tensor)
    matrix = mask.flatten(1)
    try:
        pattern_so_far(pattern, matrix).check(matrix)
    except PatternError as error:
        raise FormatError(f"the mask breaks the pattern {pattern}: {error} Restore the checkpoint.") from None


def check_numbers(what: str, tensor: object, shape: Sequence[int]) -> None:
    """Raise unless this is a floating-point tensor of a shape without NaN."""
    _check_tensor(what, tensor, shape, None)
    assert isinstance(tensor, Tensor)
    if bool(tensor.isnan().any()):
        raise FormatError(f"the {what} is NaN at {int(tensor.isnan().sum())} places. Restore the checkpoint.")


def check_number(what: str, value: object) -> None:
    """Raise unless this is a number above 0 and finite, in float32."""
    limit = torch.finfo(torch.float32).max
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limit:
        raise FormatError(f"the {what} should be a number above 0, got {_shown(value)}. Restore the checkpoint.")


def check_flag(what: str, value: object) -> None:
    """Raise unless this is a bool."""
    if not isinstance(value, bool):
        raise FormatError(f"{what} should be a bool, got {_shown(value)}. Restore the checkpoint.")


def pattern_so_far(pattern: SparsityPattern, mask: Mask) -> SparsityPattern:
    """Return the pattern that a mask has before it reaches an N:M one, with more kept weights; any other as it is."""
    if isinstance(pattern, NM) and mask.shape[1] >= pattern.m and len(mask):
        return replace(pattern, n=max(pattern.n, int(mask[0, : pattern.m].count_nonzero())))
    return pattern


def _check_tensor(what: str, tensor: object, shape: Sequence[int], dtype: torch.dtype | None) -> None:
    wanted = "a floating-point tensor" if dtype is None else f"a {dtype_name(dtype)} tensor"
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        raise FormatError(f"the {what} is not {wanted} with values, but {_shown(tensor)}. Restore the checkpoint.")
    fits = tensor.dtype == dtype if dtype is not None else tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if not fits or tuple(tensor.shape) != tuple(shape):
        raise FormatError(
            f"the {what} is not {wanted} of shape {tuple(shape)}, but {_shown(tensor)}. Restore the checkpoint."
        )


def _shown(value: object) -> str:
    """A value for a message, which must not be long."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)} on {value.device}"
    is_short = isinstance(value, bool | float | str | None) or (isinstance(value, int) and abs(value) < 2**64)
    return f"{value!r:.40}" if is_short else f"a {type(value).__name__}"


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, Mapping):
        return bool(depth) and all(isinstance(key, str) and _is_plain(v, depth - 1) for key, v in value.items())
    if isinstance(value, list | tuple):
        return bool(depth) and all(_is_plain(item, depth - 1) for item in value)
    return isinstance(value, str | int | float | None)
