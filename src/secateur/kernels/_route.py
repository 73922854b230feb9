"""Routes: how a packed weight is run. A route is a value. Its text is for files and compiled graphs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar, Self, final

from torch import Tensor

from secateur._types import Mask
from secateur.formats import Format
from secateur.kernels._layout import Layout
from secateur.patterns import SparsityPattern

# The arithmetic that routes may have, the most exact first.
PRECISIONS = ("exact", "bfloat16", "int8")


class Route(ABC):
    """How a packed weight is run: a frozen dataclass that can be compared, hashed and printed.

    Its text names it in files and compiled graphs.
    """

    name: ClassVar[str]
    precision: ClassVar[str] = "exact"  # its arithmetic: "exact", "bfloat16" or "int8"

    @abstractmethod
    def __str__(self) -> str:
        """Return the text of the route."""

    @property
    @abstractmethod
    def needs_kernels(self) -> bool:
        """Whether the route is only fast with native kernels."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """Return the route of this class that a text names, or None."""

    @classmethod
    @abstractmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Return the routes of this class that are worth measuring for a weight.

        Args:
            packed: the weight.
            patterns: the patterns that its zeros satisfy, the one of the format among them.
            density: stored weights as a fraction of all weights.
        """

    @abstractmethod
    def why_not(self, packed: Format) -> str | None:
        """Return the reason why no measurement on any machine can have chosen the route for a weight, or None."""


class SizedRoute(Route):
    """A route whose fields are sizes. Its text is its name and the sizes with a separator: ``panels:128x256``."""

    grammar: ClassVar[str] = ""  # a regular expression for the sizes in the text; each group of it is a field
    separator: ClassVar[str] = "x"

    @final
    def __str__(self) -> str:
        sizes = [str(getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return ":".join([self.name, self.separator.join(sizes)]) if sizes else self.name

    @property
    @final
    def needs_kernels(self) -> bool:
        """Whether the route runs a layout. Dense arithmetic is as fast without native kernels."""
        return isinstance(self, LayoutRoute)

    @classmethod
    @final
    def read(cls, text: str) -> Self | None:
        """Return the route of this class that a text names, or None."""
        found = re.fullmatch(f"{cls.name}:{cls.grammar}" if cls.grammar else cls.name, text)
        return None if found is None else cls(*map(int, found.groups()))


class LayoutRoute(SizedRoute):
    """A route that runs a weight in a layout."""

    stores_zeros: ClassVar[bool] = False  # whether the layout has the zeros that the format stores

    @abstractmethod
    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight, with values of the same dtype.

        Args:
            values: ``[out, in]``.
            mask: ``[out, in]`` bool, which values to store.

        Raises:
            KernelError: the weight does not fit the layout.
        """
