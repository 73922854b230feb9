"""Masks that a report keeps in memory: one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy
import torch
from torch import Tensor

from secateur._types import Mask

_Bits: TypeAlias = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]


@dataclass(frozen=True, eq=False)
class PackedMask:
    """The mask of one parameter, packed to bits.

    Args:
        names: qualified names of the parameter: that under its first module, and those under the modules that share it.
        shape: of the parameter.
        pruned: weights that the mask prunes.
        parts: which part of the parameter (None for all), its shape, and the bits of its flattened mask, 1 = kept. What
            no part covers is kept.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    pruned: int
    parts: tuple[tuple[int | slice | None, tuple[int, ...], _Bits], ...]

    @classmethod
    def of(
        cls, names: Sequence[str], mask: Tensor, shape: Sequence[int] | None = None, part: int | slice | None = None
    ) -> PackedMask:
        """Pack a bool mask, True = kept.

        Args:
            names: see the class.
            mask: in the shape of the parameter, or of a part of it.
            shape: of the parameter; by default that of the mask.
            part: index of the part.
        """
        pruned = mask.numel() - int(mask.count_nonzero())
        bits = numpy.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))
        return cls(tuple(names), tuple(shape or mask.shape), pruned, ((part, tuple(mask.shape), bits),))

    def merged(self, other: PackedMask) -> PackedMask:
        """Return the mask of two parts of one parameter that do not overlap."""
        return replace(self, pruned=self.pruned + other.pruned, parts=(*self.parts, *other.parts))

    def mask(self) -> Tensor:
        """Return the mask, bool, in the shape of the parameter, on the CPU."""
        whole = torch.ones(self.shape, dtype=torch.bool)
        for part, shape, bits in self.parts:
            flat = numpy.unpackbits(bits, count=math.prod(shape)).view(numpy.bool_)
            (whole if part is None else whole[part]).copy_(torch.from_numpy(flat).view(shape))
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes that the mask takes."""
        return sum(bits.nbytes for _, _, bits in self.parts)


class StoredMasks(Mapping[str, Mask]):
    """Masks by the qualified name of their parameter, as in a ``state_dict``. Each is unpacked when it is looked up.

    Args:
        masks: of parameters. Several masks of one parameter, for matrices inside it, become one.
    """

    def __init__(self, masks: Iterable[PackedMask] = ()) -> None:
        self._masks: dict[str, PackedMask] = {}
        for mask in masks:
            earlier = self._masks.get(mask.names[0])
            self._masks[mask.names[0]] = mask if earlier is None else earlier.merged(mask)

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name].mask()

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        pruned = sum(mask.pruned for mask in self._masks.values())
        return f"<masks of {len(self)} parameters that prune {pruned:,} weights>"

    def packed(self) -> tuple[PackedMask, ...]:
        """Return the masks as they are in memory."""
        return tuple(self._masks.values())
