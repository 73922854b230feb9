"""What can be removed from a model: units, where they lie in its tensors, and what stands in the way of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from secateur.reports import Boundary

# `heads`: a key/value head with all query heads that read it. `query_heads`: the same number of query heads of each
# key/value head. `hidden`: channels of the residual stream. `layers`: blocks of a list.
Kind: TypeAlias = Literal["layers", "heads", "query_heads", "ffn", "channels", "experts", "hidden"]
KINDS: tuple[Kind, ...] = ("layers", "heads", "query_heads", "ffn", "channels", "experts", "hidden")


@dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a dimension lie in one tensor.

    Args:
        tensor: qualified name of the parameter or buffer.
        dim: of the tensor.
        indices: int64 ``[units, width]``: for each unit, its indices along that dimension.
        is_input: whether the tensor multiplies what the units give out and sums over them, as the input features of the
            next linear layer do. Zeros there take the units out of the model. All other places make the units.
    """

    tensor: str
    dim: int
    indices: NDArray[np.int64]
    is_input: bool = False

    @property
    def width(self) -> int:
        """How many indices one unit has."""
        return int(self.indices.shape[1])

    def of(self, units: object) -> NDArray[np.int64]:
        """Return the sorted indices of some units, given by their numbers."""
        return np.sort(self.indices[np.asarray(units, dtype=np.int64)], axis=None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Place):
            return NotImplemented
        here, there = (self.tensor, self.dim, self.is_input), (other.tensor, other.dim, other.is_input)
        return here == there and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.tensor, self.dim, self.is_input, self.indices.shape))


@dataclass(frozen=True)
class Dimension:
    """Units of one kind at one location of a model, of which any may be removed, each without the others.

    Args:
        name: where: the block and the kind, such as ``"encoder.layer.0.ffn"``. For ``layers``, the name of the list of
            blocks, such as ``"encoder.layer"``.
        kind: of its units.
        size: how many units there are.
        places: of the units in the model's tensors; none for ``layers``.
        group_size: units in a row of which the same number must go from each such group, as query heads of one
            key/value head must; 0 if any may go.
        routers: names of the modules that choose among the units, for ``experts``.
        fixed: units that cannot go.
        least: how many units must stay.
        notes: what a user should know.
        cut: an operation that cuts a range out of these units, or empty.
        is_doubtful: whether code may keep their number, as where a range is cut out or a dimension is split. Whether it
            follows when units go is only known from trying.
    """

    name: str
    kind: Kind
    size: int
    places: tuple[Place, ...] = ()
    group_size: int = 0
    routers: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()
    least: int = 1
    notes: tuple[str, ...] = ()
    cut: str = ""
    is_doubtful: bool = False

    @property
    def inputs(self) -> Iterator[Place]:
        """The places that read the units."""
        return (place for place in self.places if place.is_input)


@dataclass(frozen=True)
class Graph:
    """What can be removed from a model, as found in a forward pass.

    Args:
        dimensions: of which units can be removed.
        boundaries: dimensions of parameters that cannot be made smaller.
        seconds: that it took to find them.
    """

    dimensions: tuple[Dimension, ...]
    boundaries: tuple[Boundary, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def __getitem__(self, name: str) -> Dimension:
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise KeyError(name)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that it has, in the order of ``KINDS``."""
        return tuple(kind for kind in KINDS if any(dimension.kind == kind for dimension in self.dimensions))

    def of_kind(self, kind: Kind) -> tuple[Dimension, ...]:
        """Return the dimensions of one kind."""
        return tuple(dimension for dimension in self.dimensions if dimension.kind == kind)
