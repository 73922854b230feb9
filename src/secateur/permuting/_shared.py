"""Which units can be read in another order, and who makes and reads them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.graph import Dimension, Graph, Place
from secateur.layers import Layer, Observed
from secateur.shrinking import find_consumers


@dataclass(frozen=True)
class Read:
    """Columns of a layer's matrix that read units.

    Args:
        layer: that reads.
        columns: int64 ``[units, width]``: of its matrix, for each unit.
    """

    layer: Layer
    columns: NDArray[np.int64]

    def aligned(self, m: int) -> list[NDArray[np.int64]]:
        """Return runs ``[units, width]`` of these columns, each from a multiple of m on; none where they have others.

        The columns of one unit lie together, or those of all units do and then come again, as where several query
        heads read the values of one head.
        """
        width = self.columns.shape[1]
        found = [self.columns] if width == 1 else [self.columns, *(self.columns[:, [j]] for j in range(width))]
        whole = [_starts_group(run, m) for run in found]
        if whole[0]:
            return found[:1]
        return found[1:] if width > 1 and all(whole[1:]) else []


def _starts_group(run: NDArray[np.int64], m: int) -> bool:
    first = int(run[0, 0])
    return first % m == 0 and np.array_equal(run.reshape(-1), np.arange(first, first + run.size))


@dataclass(frozen=True)
class Part:
    """Units with one order.

    Args:
        size: how many there are.
        places: of the units in the model's tensors.
        reads: where layers read them.
    """

    size: int
    places: tuple[Place, ...]
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Shared:
    """Units of which each part has an order of its own, such as the values of all heads of an attention.

    Args:
        name: where they are.
        kind: of the units.
        parts: each with an order.
        instead: others to try if the model is another function with these in another order.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    instead: tuple[Shared, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that read the units."""
        found = {read.layer.name: read.layer for part in self.parts for read in part.reads}
        return tuple(found.values())

    @property
    def units(self) -> int:
        """How many there are in all parts."""
        return sum(part.size for part in self.parts)

    def looks(self, model: nn.Module) -> object:
        """Return what is equal for those that behave alike, such as in all blocks of a model."""
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        return self.kind, tuple(
            (
                part.size,
                tuple(
                    (
                        type(model.get_submodule(place.tensor.rpartition(".")[0])),
                        ".".join(part for part in place.tensor.split(".") if not part.isdigit()),
                        tuple(tensors[place.tensor].shape),
                        place.dim,
                        place.width,
                    )
                    for place in part.places
                ),
            )
            for part in self.parts
        )


def find_shared(model: nn.Module, graph: Graph, observed: Observed, layers: Sequence[Layer]) -> list[Shared]:
    """Return the units that layers read in an order that could be another one.

    Units that can go one by one can also change places: all tensors that make and read them are known. Inside of heads
    no single channel can go, since all heads have one width; but those of the values are mixed by no operation before
    the output projection reads them, so that each key/value head may have an order of its own.

    Args:
        model: of the graph.
        graph: of what can be removed.
        observed: what a forward pass showed.
        layers: that count.
    """
    known = {layer.name for layer in layers}
    consumers = find_consumers(model, graph, observed)
    found = []
    for dimension in graph.dimensions:
        reads = tuple(
            Read(consumer.layer, consumer.columns)
            for consumer in consumers.of(dimension)
            if consumer.layer.name in known
        )
        if not reads or dimension.kind in ("layers", "experts", "query_heads"):
            continue
        if dimension.kind == "heads":
            choices = list(_values(dimension, reads))
            found += [replace(choices[0], instead=tuple(choices[1:]))] if choices else []
        else:
            found.append(Shared(dimension.name, dimension.kind, (Part(dimension.size, dimension.places, reads),)))
    return found


def _values(dimension: Dimension, reads: tuple[Read, ...]) -> Iterator[Shared]:
    """Channels inside of heads that may be the values that a projection reads, the likeliest first.

    Which tensors make the values is not known from their shapes: queries, keys and values look alike. It is tried.
    """
    width = min((place.width for place in dimension.places if place.width > 1), default=1)
    inputs = [place for place in dimension.inputs if place.width % width == 0]
    if width < 2 or len(inputs) != len(list(dimension.inputs)) or any(r.columns.shape[1] % width for r in reads):
        return
    made = [place for place in dimension.places if not place.is_input and place.width % width == 0]
    owners = list(dict.fromkeys(place.tensor.rpartition(".")[0] for place in made))
    name = f"{dimension.name.removesuffix('heads').rstrip('.')}.values".lstrip(".")
    for owner in reversed(owners):
        own = [place for place in made if place.tensor.rpartition(".")[0] == owner]
        for number in reversed(range(min(place.width for place in own) // width)):
            parts = []
            for head in range(dimension.size):
                columns = slice(number * width, (number + 1) * width)
                places = [_inside(place, place.indices[head, columns], width) for place in own]
                places += [_inside(place, place.indices[head], width) for place in inputs]
                head_reads = tuple(Read(r.layer, r.columns[head].reshape(-1, width).T) for r in reads)
                parts.append(Part(width, tuple(places), head_reads))
            yield Shared(name, "values", tuple(parts))


def _inside(place: Place, indices: NDArray[np.int64], width: int) -> Place:
    return replace(place, indices=np.ascontiguousarray(indices.reshape(-1, width).T))
