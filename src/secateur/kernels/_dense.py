"""The routes of dense arithmetic: the weight with all its zeros, in PyTorch's order or in that of oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from secateur.formats import Format
from secateur.kernels._route import SizedRoute
from secateur.patterns import SparsityPattern


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16, so that they are faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


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
class PrepackedBfloat16Route(SizedRoute):
    """Run the weight with its zeros in bfloat16, reordered once for oneDNN.

    Inputs, weights, the bias and outputs are rounded to bfloat16. Sums are float32.
    """

    name: ClassVar[str] = "prepacked-bfloat16"
    precision: ClassVar[str] = "bfloat16"

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
