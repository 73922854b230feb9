"""Which matrices read the units of a model, and in which of their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._errors import PatternError, RecipeError
from secateur.graph import Dimension, Graph
from secateur.layers import Layer, Observed, select_layers
from secateur.solvers import columns_of


@dataclass(frozen=True)
class Consumer:
    """A matrix that reads the units of a dimension.

    Args:
        dimension: that it reads.
        layer: whose matrix ``[out, in]`` it is.
        columns: int64 ``[units, width]``: for each unit, the columns that read it.
    """

    dimension: Dimension
    layer: Layer
    columns: NDArray[np.int64]


@dataclass(frozen=True)
class Consumers:
    """All matrices that read units.

    Args:
        by_layer: by the name of a layer, the dimensions that it reads.
        unknown: by the name of a dimension, tensors that read it but are no layers, so that nothing is known of their
            inputs.
    """

    by_layer: Mapping[str, tuple[Consumer, ...]]
    unknown: Mapping[str, tuple[str, ...]]

    @property
    def layers(self) -> list[Layer]:
        """The layers that read units, in the order of the model."""
        return [consumers[0].layer for consumers in self.by_layer.values()]

    def of(self, dimension: Dimension) -> list[Consumer]:
        """Return the consumers of one dimension."""
        return [found for group in self.by_layer.values() for found in group if found.dimension.name == dimension.name]


def find_consumers(model: nn.Module, graph: Graph, observed: Observed) -> Consumers:
    """Return the layers that read the units of a graph.

    Args:
        model: of the graph.
        graph: with the units.
        observed: what a forward pass showed: which layers run, and how weights are read.
    """
    try:
        layers, _ = select_layers(model, ("*",), (), observed)
    except RecipeError:  # there is none, such as in a model of raw parameters
        layers = []
    names = {id(p): name for name, p in model.named_parameters()}
    all_names: dict[str, str] = {}  # of a tied parameter, the first name by any other
    for name, parameter in model.named_parameters(remove_duplicate=False):
        all_names[name] = names[id(parameter)]
    by_parameter: dict[str, list[Layer]] = {}
    for layer in layers:
        by_parameter.setdefault(names[id(layer.parameter)], []).append(layer)
    found: dict[str, list[Consumer]] = {}
    unknown: dict[str, list[str]] = {}
    order = {layer.name: number for number, layer in enumerate(layers)}
    for dimension in graph.dimensions:
        seen: set[str] = set()
        for place in dimension.inputs:
            tensor = all_names.get(place.tensor, place.tensor)
            if tensor in seen:
                continue
            seen.add(tensor)
            if tensor not in by_parameter:
                unknown.setdefault(dimension.name, []).append(place.tensor)
            for layer in by_parameter.get(tensor, ()):
                try:
                    columns = columns_of(layer, place.dim, place.indices).numpy()
                    found.setdefault(layer.name, []).append(Consumer(dimension, layer, columns))
                except PatternError:  # rows of it, such as of a matrix that is also read the other way
                    unknown.setdefault(dimension.name, []).append(place.tensor)
    ordered = {name: tuple(found[name]) for name in sorted(found, key=lambda name: order[name])}
    return Consumers(ordered, {name: tuple(tensors) for name, tensors in unknown.items()})


def removed_columns(consumers: Sequence[Consumer], units: Mapping[str, Iterable[int]]) -> Tensor:
    """Return bool ``[in]``: which columns of a matrix read units that go.

    Args:
        consumers: of one layer.
        units: by the name of a dimension, those that go.
    """
    gone = torch.zeros(consumers[0].layer.matrix().shape[1], dtype=torch.bool)
    for consumer in consumers:
        numbers = np.asarray(tuple(units.get(consumer.dimension.name, ())), dtype=np.int64)
        gone[torch.from_numpy(consumer.columns[numbers].reshape(-1))] = True
    return gone
