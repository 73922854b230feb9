"""Routes: how a packed weight is run. A route is a value. Its text is for files and compiled graphs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar, Self

from torch import Tensor

from secateur._types import Mask
from secateur.formats import Format
from secateur.kernels._layout import Layout
from secateur.patterns import SparsityPattern


class Route(ABC):
    """How a packed weight is run: a frozen dataclass that can be compared, hashed and printed.

    Its text is its name and its fields, joined by ``separator``: ``panels:128x256``.
    """

    name: ClassVar[str]
    grammar: ClassVar[str] = ""  # a regular expression for the fields in the text; each group of it is a field
    separator: ClassVar[str] = "x"

    def __str__(self) -> str:
        values = [str(getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return ":".join([self.name, self.separator.join(values)]) if values else self.name

    @property
    def needs_kernels(self) -> bool:
        """Whether the route is only fast with native kernels."""
        return False

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Return the route of this class that a text names, or None."""
        found = re.fullmatch(f"{cls.name}:{cls.grammar}" if cls.grammar else cls.name, text)
        return None if found is None else cls(*map(int, found.groups()))

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


class LayoutRoute(Route):
    """A route that runs a weight in a layout."""

    needs_kernels = True
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
