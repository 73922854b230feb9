"""The routes of dense arithmetic: the weight with all its zeros, in PyTorch's order or in that of oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from secateur.formats import Format
from secateur.kernels._route import SizedRoute
from secateur.patterns import SparsityPattern


@dataclass(frozen=True)
class DenseRoute(SizedRoute):
    """Run the weight with its zeros by ``F.linear``."""

    name: ClassVar[str] = "dense"

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Always one."""
        return [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits."""
        return None


@dataclass(frozen=True)
class PrepackedRoute(SizedRoute):
    """Run the weight with its zeros, reordered once for oneDNN, as ``torch.compile`` does with frozen weights."""

    name: ClassVar[str] = "prepacked"

    @classmethod
    def candidates(cls, packed: Format, patterns: Sequence[SparsityPattern], density: float) -> list[Self]:
        """Always one."""
        return [cls()]

    def why_not(self, packed: Format) -> str | None:
        """Any weight fits."""
        return None
