"""The routes of whole rows and columns: the kept ones are a smaller dense matrix, which runs by another route."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur._types import Mask
from secateur.formats import ColumnPacked, Format, RowPacked
from secateur.kernels._dense import DenseRoute, PrepackedRoute
from secateur.kernels._int8 import MOST_COLUMNS
from secateur.kernels._int8_panels import Int8PanelRoute
from secateur.kernels._layout import Layout
from secateur.kernels._prepared import Prepared, StoredWeight, in_channels_last
from secateur.kernels._route import LayoutRoute, Route
from secateur.kernels._tiles import TileLayout
from secateur.kernels._window import Window
from secateur.patterns import SparsityPattern

_HEIGHT = 16  # of the tiles below: a higher tile is cut into strips of this height


@dataclass(frozen=True)
class _WholeTiles(LayoutRoute):
    """Run a dense matrix as tiles of 16 rows, each as wide as the matrix."""

    name: ClassVar[str] = "tiles"

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        return []

    def why_not(self, packed: Format) -> str | None:
        return None

    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        missing = -len(values) % _HEIGHT  # rows of zeros at the end, whose outputs are dropped
        tall = nn.functional.pad(values, (0, 0, 0, missing))
        everything = torch.ones_like(tall, dtype=torch.bool)
        return TileLayout.pack(tall, everything, value_dtype=values.dtype, height=_HEIGHT, width=values.shape[1])


# By the ending of the text of a route.
_INNER: dict[str, Route] = {"": DenseRoute(), ":prepacked": PrepackedRoute(), ":tiles": _WholeTiles()}
_INNER_INT8: dict[str, Route] = {":int8-panels": Int8PanelRoute()}


@dataclass(frozen=True)
class CompactRoute(Route):
    """Run the kept rows or columns of a weight as a dense matrix.

    Args:
        inner: the route of that matrix.
    """

    format_type: ClassVar[type[Format]]
    inners: ClassVar[dict[str, Route]] = _INNER

    inner: Route = field(default_factory=DenseRoute)

    def __str__(self) -> str:
        return self.name + next(suffix for suffix, inner in self.inners.items() if inner == self.inner)

    @property
    def needs_kernels(self) -> bool:
        """Whether the route is only fast with native kernels."""
        return self.inner.needs_kernels

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Return the route of this class that a text names, or None."""
        inner = cls.inners.get(text.removeprefix(cls.name)) if text.startswith(cls.name) else None
        return None if inner is None else cls(inner)

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Every inner route, for a weight that is stored as rows or columns."""
        if not isinstance(packed, cls.format_type):
            return []
        found = [cls(inner) for inner in cls.inners.values() if packed.values.numel() or not inner.needs_kernels]
        return [route for route in found if route.why_not(packed) is None]

    def why_not(self, packed: Format) -> str | None:
        """The weight must be stored as rows or columns."""
        if not isinstance(packed, self.format_type):
            return f"the route {self.name} runs only a weight that is stored as {self.name}, got {packed!r}"
        if self.precision == "int8" and packed.values.shape[1] > MOST_COLUMNS:
            return f"it keeps more than {MOST_COLUMNS:,} inputs"
        return None

    def compact(self, packed: Format) -> StoredWeight:
        """Return the kept rows or columns as a matrix.

        Raises:
            KernelError: the weight is not stored as rows or columns.
        """
        if (reason := self.why_not(packed)) is not None:
            raise KernelError(f"{reason}. Use another route.")
        return StoredWeight(packed.values, packed.scales, packed.values)

    @abstractmethod
    def around(self, inner: Prepared, packed: Format) -> Prepared:
        """Return what runs the whole weight, given what runs the matrix of the kept rows or columns."""


@dataclass(frozen=True)
class RowRoute(CompactRoute):
    """Run the kept rows. Every other output is the bias."""

    name: ClassVar[str] = "rows"
    format_type: ClassVar[type[Format]] = RowPacked

    def around(self, inner: Prepared, packed: Format) -> Prepared:
        """Return what writes the outputs of the kept rows to their places."""
        assert isinstance(packed, RowPacked)
        return _Rows(inner, packed.rows, packed.shape[0])


@dataclass(frozen=True)
class ColumnRoute(CompactRoute):
    """Run the kept columns on the inputs that they read."""

    name: ClassVar[str] = "columns"
    format_type: ClassVar[type[Format]] = ColumnPacked

    def around(self, inner: Prepared, packed: Format) -> Prepared:
        """Return what gathers the inputs of the kept columns."""
        assert isinstance(packed, ColumnPacked)
        return _Columns(inner, packed.columns)


@dataclass(frozen=True)
class Int8RowRoute(RowRoute):
    """Run the kept rows in 8 bits."""

    precision: ClassVar[str] = "int8"
    inners: ClassVar[dict[str, Route]] = _INNER_INT8

    inner: Route = field(default_factory=Int8PanelRoute)


@dataclass(frozen=True)
class Int8ColumnRoute(ColumnRoute):
    """Run the kept columns in 8 bits. Inputs are rounded after those of other columns were left out."""

    precision: ClassVar[str] = "int8"
    inners: ClassVar[dict[str, Route]] = _INNER_INT8

    inner: Route = field(default_factory=Int8PanelRoute)


class _Rows(Prepared):
    def __init__(self, inner: Prepared, rows: Tensor, out: int) -> None:
        self._inner, self._rows, self._out = inner, rows.long(), out
        self.nbytes = inner.nbytes + self._rows.nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(x.shape[0], self._out)
        if bias is not None:
            y += bias
        kept = self._inner.run(x, None if bias is None else bias[self._rows])
        return y.index_copy_(1, self._rows, kept)

    def convolve(self, x: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        kept = self._inner.convolve(x, None if bias is None else bias[self._rows], window)
        y = kept.new_zeros(len(kept), self._out, *kept.shape[2:])
        if in_channels_last(kept):
            y = y.contiguous(memory_format=torch.channels_last)
        if bias is not None:
            y += bias[:, None, None]
        return y.index_copy_(1, self._rows, kept)


class _Columns(Prepared):
    def __init__(self, inner: Prepared, columns: Tensor) -> None:
        self._inner, self._columns = inner, columns.long()
        self.nbytes = inner.nbytes + self._columns.nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._inner.run(x.index_select(1, self._columns), bias)
