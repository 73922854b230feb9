"""How a model is packed, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from secateur._checks import globs, integer, number, one_of
from secateur._errors import RecipeError
from secateur.formats import as_value_dtype


@dataclass(frozen=True)
class PackSettings:
    """All settings of how a model is packed.

    Args:
        batch_sizes: input rows (tokens, samples) at which to measure. Any other number takes the route of the nearest.
        value_dtype: dtype of stored values, or its name: float32, bfloat16, float16 or int8 (with one scale for each
            output row). None for that of the weights.
        include: glob patterns on qualified names. If there are any, exactly the layers that match one are considered.
        exclude: glob patterns on qualified names. A layer that matches is not packed, even if it matches ``include``.
        memory: limit for the bytes that a layer's routes take together, besides the stored weight, as a multiple of the
            bytes of the dense weight. Each route keeps the weight in its own order. With 2 or more, this may be the
            dense weight in oneDNN's order, which is fast at large batches.
        precision: arithmetic of products: ``"exact"``, ``"bfloat16"`` or ``"int8"``. With ``"int8"``, and beside int8
            values with ``"bfloat16"``, embeddings are stored as rows of int8, too.

    Raises:
        RecipeError: no batch sizes, one below 1, an unknown value dtype or precision, or a memory that is not above 0.
        TypeError: a setting of another type.

    Example:
        >>> import secateur
        >>> secateur.PackSettings(batch_sizes=[8, 1], value_dtype="int8")
        PackSettings(batch_sizes=(1, 8), value_dtype=torch.int8, include=(), exclude=(), memory=1.0, precision='exact')
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    value_dtype: torch.dtype | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    memory: float = 1.0
    precision: str = "exact"

    def __post_init__(self) -> None:
        if not isinstance(self.batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must be several ints, got {type(self.batch_sizes).__name__}")
        sizes = tuple(sorted({integer("a batch size", rows, 1) for rows in self.batch_sizes}))
        if not sizes:
            raise RecipeError("batch_sizes is empty. Give at least one number of input rows to measure at.")
        object.__setattr__(self, "batch_sizes", sizes)
        object.__setattr__(self, "value_dtype", as_value_dtype(self.value_dtype))
        one_of("precision", self.precision, ("exact", "bfloat16", "int8"))
        object.__setattr__(self, "include", globs("include", self.include))
        object.__setattr__(self, "exclude", globs("exclude", self.exclude))
        object.__setattr__(self, "memory", number("memory", self.memory, above=0))
