"""How a model is packed, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from secateur._checks import globs, integer, number, one_of
from secateur._errors import RecipeError
from secateur.formats import as_value_dtype, is_scaled, value_name
from secateur.kernels import PRECISIONS

# The arithmetic that each precision allows. There is no sparse route for bfloat16, so that exact ones are allowed too.
_ALLOWED = {"exact": ("exact",), "bfloat16": ("exact", "bfloat16"), "int8": ("int8",)}
_STORED = {"exact": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class PackSettings:
    """All settings of how a model is packed.

    Args:
        batch_sizes: input rows (tokens, samples) at which to measure. Any other number takes the route of the nearest.
        value_dtype: dtype of stored values, or its name: float32, bfloat16, float16, int8 (with one scale for
            each output row) or int4 (one for each row and group of 64 columns). None for that of the weights.
        include: glob patterns on qualified names. If there are any, exactly the layers that match one are considered.
        exclude: glob patterns on qualified names. A layer that matches is not packed, even if it matches ``include``.
        memory: limit for the bytes that a layer's routes take together, besides the stored weight, as a multiple of the
            bytes of the dense weight. Each route keeps the weight in its own order. With 2 or more, this may be the
            dense weight in oneDNN's order, which is fast at large batches.
        precision: the arithmetic of products. ``"exact"``: float32 sums of the stored values. ``"bfloat16"``: inputs
            and weights may be rounded to bfloat16, and values are stored so, unless ``value_dtype`` says otherwise.
            ``"int8"``: all products are of 8-bit numbers, with one scale for each output row of the weight and one for
            each input row, and values are stored as int8. None is ``"exact"``, but layers that are packed already keep
            theirs. With ``"bfloat16"`` and ``"int8"`` layers without zeros are packed, too.
            With ``"int8"``, and beside int8 values with ``"bfloat16"``, embeddings are stored as rows of int8.
        tolerance: instead of a precision: the largest relative error of outputs, ``|packed - dense| / |dense|``, of
            each layer and at the end of the model. For each layer the fastest of all precisions that keeps within is
            taken, whether it has zeros or not. This needs inputs, to measure the errors with.

    Raises:
        RecipeError: no batch sizes, one below 1, an unknown value dtype or precision, a memory or a tolerance that is
            not above 0, or settings that exclude each other.
        TypeError: a setting of another type.

    Example:
        >>> import secateur
        >>> secateur.PackSettings(batch_sizes=[8, 1], value_dtype="int8")
        PackSettings(batch_sizes=(1, 8), value_dtype=torch.int8, include=(), exclude=(), memory=1.0, precision=None, \
tolerance=None)
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    value_dtype: torch.dtype | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    memory: float = 1.0
    precision: str | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must be several ints, got {type(self.batch_sizes).__name__}")
        sizes = tuple(sorted({integer("a batch size", rows, 1) for rows in self.batch_sizes}))
        if not sizes:
            raise RecipeError("batch_sizes is empty. Give at least one number of input rows to measure at.")
        object.__setattr__(self, "batch_sizes", sizes)
        object.__setattr__(self, "value_dtype", as_value_dtype(self.value_dtype))
        object.__setattr__(self, "include", globs("include", self.include))
        object.__setattr__(self, "exclude", globs("exclude", self.exclude))
        object.__setattr__(self, "memory", number("memory", self.memory, above=0))
        if self.precision is not None:
            one_of("precision", self.precision, PRECISIONS)
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", number("tolerance", self.tolerance, most=1, above=0))
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        if self.precision is not None and self.tolerance is not None:
            raise RecipeError(
                f"precision={self.precision!r} and tolerance={self.tolerance:g} were given. A tolerance chooses the "
                "precision of each layer by its error, so that one excludes the other. Leave one of them out."
            )
        if self.precision == "int8" and self.value_dtype is not None and not is_scaled(self.value_dtype):
            raise RecipeError(
                f"precision='int8' and value_dtype='{value_name(self.value_dtype)}' were given. Products of 8-bit "
                "numbers need values that are stored in 8 bits or fewer. Leave value_dtype out, or give "
                "precision='exact'."
            )

    @property
    def precisions(self) -> tuple[str, ...]:
        """The arithmetic that products may have, the most exact first."""
        return PRECISIONS if self.tolerance is not None else _ALLOWED[self.precision or "exact"]

    @property
    def stored(self) -> torch.dtype | None:
        """The dtype of stored values; None for that of the weights."""
        return self.value_dtype if self.value_dtype is not None else _STORED[self.precision or "exact"]

    @property
    def without_tolerance(self) -> PackSettings:
        """The same for layers whose errors cannot be measured: what a tolerance would allow is exact for them."""
        return self if self.tolerance is None else replace(self, tolerance=None)

    @property
    def is_asked(self) -> bool:
        """Whether a precision or a tolerance was given."""
        return self.precision is not None or self.tolerance is not None

    @property
    def takes_whole(self) -> bool:
        """Whether layers without zeros are packed, too."""
        return self.precision in ("bfloat16", "int8") or self.tolerance is not None
