"""How a model is packed, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from secateur._checks import globs, integer, number
from secateur._errors import RecipeError
from secateur.formats import as_value_dtype


@dataclass(frozen=True)
class PackSettings:
    """Everything that decides how a model is packed, apart from the model and the machine.

    Args:
        batch_sizes: input rows (tokens, samples) at which to measure; what lies between takes the nearest.
        value_dtype: float32, bfloat16, float16 or int8 (one scale for each output row), or its name; None for the
            weights' own.
        include: glob patterns on qualified names; given, exactly these layers are considered.
        exclude: glob patterns that win over ``include``.
        memory: how many times its dense bytes the layouts that a layer's kernels keep may take together, besides the
            stored weight. 2 or more also admits dense weights in oneDNN's own order, faster at large batches.

    Raises:
        RecipeError: batch sizes below 1 or none, no such value dtype, or a memory that is not positive.
        TypeError: a setting of another type.

    Example:
        >>> import secateur
        >>> secateur.PackSettings(batch_sizes=[8, 1], value_dtype="int8")
        PackSettings(batch_sizes=(1, 8), value_dtype=torch.int8, include=(), exclude=(), memory=1.0)
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    value_dtype: torch.dtype | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    memory: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must be several ints, got {type(self.batch_sizes).__name__}")
        sizes = tuple(sorted({integer("a batch size", rows, 1) for rows in self.batch_sizes}))
        if not sizes:
            raise RecipeError("batch_sizes is empty: there is nothing to measure at.")
        object.__setattr__(self, "batch_sizes", sizes)
        object.__setattr__(self, "value_dtype", as_value_dtype(self.value_dtype))
        object.__setattr__(self, "include", globs("include", self.include))
        object.__setattr__(self, "exclude", globs("exclude", self.exclude))
        object.__setattr__(self, "memory", number("memory", self.memory, above=0))
