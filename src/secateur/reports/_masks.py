"""Masks that a report keeps in memory: one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from secateur._types import Mask


@dataclass(frozen=True, eq=False)
class PackedMask:
    """The mask of one parameter, packed to bits.

    Args:
        names: qualified names of the parameter: that under its first module, and those under the modules that share it.
        shape: of the parameter.
        pruned: weights that the mask prunes.
        bits: of the flattened mask, 1 = kept.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    pruned: int
    bits: numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]

    @classmethod
    def of(cls, names: Sequence[str], mask: Tensor) -> PackedMask:
        """Pack a bool mask in the shape of the parameter, True = kept."""
        pruned = mask.numel() - int(mask.count_nonzero())
        bits = numpy.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))
        return cls(tuple(names), tuple(mask.shape), pruned, bits)

    def merged(self, other: PackedMask) -> PackedMask:
        """Return the mask that prunes what either of two masks of one parameter prunes."""
        bits = self.bits & other.bits
        kept = int(numpy.unpackbits(bits, count=math.prod(self.shape)).sum())
        return replace(self, pruned=math.prod(self.shape) - kept, bits=bits)

    def mask(self) -> Tensor:
        """Return the mask, bool, in the shape of the parameter, on the CPU."""
        flat = numpy.unpackbits(self.bits, count=math.prod(self.shape)).view(numpy.bool_)
        return torch.from_numpy(flat).view(self.shape)


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
