"""Routes: how a packed weight is run, as values. Their text, ``panels:128x256``, is for files and compiled graphs."""

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
    """A way of running a packed weight. A value: a frozen dataclass that compares, hashes and prints.

    Its text is its name, and its fields joined by ``separator``: ``panels:128x256``.
    """

    name: ClassVar[str]
    grammar: ClassVar[str] = ""  # of the fields in the text; each group is a field
    separator: ClassVar[str] = "x"

    def __str__(self) -> str:
        values = [str(getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return ":".join([self.name, self.separator.join(values)]) if values else self.name

    @property
    def needs_kernels(self) -> bool:
        """Whether only native kernels make it worth running."""
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
            patterns: that its zeros satisfy, the format's own among them.
            density: stored weights over all weights.
        """

    @abstractmethod
    def why_not(self, packed: Format) -> str | None:
        """Return the reason that the route cannot have been chosen for a weight, on whatever machine, or None."""


class LayoutRoute(Route):
    """A route that runs a layout, made of any weight that fits it."""

    needs_kernels = True
    stores_zeros: ClassVar[bool] = False  # whether zeros that the format stores are laid out too, to share its values

    @abstractmethod
    def lay_out(self, values: Tensor, mask: Mask) -> Layout:
        """Return the layout of a weight ``[out, in]`` of which the mask is stored, with values of the same dtype."""
