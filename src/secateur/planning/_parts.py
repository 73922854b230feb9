"""The parts of a model that a plan decides on: its blocks, with what can go inside of them, and what lies between."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from secateur.graph import Dimension, Graph
from secateur.layers import Layer

INNER = ("ffn", "heads", "channels", "experts")  # kinds whose removal keeps the function exact


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a model, for which one option is chosen.

    Args:
        name: of the block, such as ``"encoder.layer.3"``, or of the dimension.
        dimensions: units in it that can go.
        layers: in it that can be pruned.
        kind: equal for parts of the same structure, which cost the same.
        parameters: of it.
        shares: by the name of a dimension, which part of the parameters goes with all of its units.
        blocks: the list that the block is in; None for a part that cannot go as a whole.
        unit: its number in that list.
    """

    name: str
    dimensions: tuple[Dimension, ...]
    layers: tuple[Layer, ...]
    kind: str
    parameters: int
    shares: Mapping[str, float] = field(default_factory=dict)
    blocks: Dimension | None = None
    unit: int = 0


def parts_of(model: nn.Module, graph: Graph, layers: Sequence[Layer]) -> tuple[Part, ...]:
    """Return the parts of a model, in its order: blocks, and dimensions that lie in none.

    Args:
        model: dense.
        graph: what can go.
        layers: that can be pruned. Where a model has blocks, those outside of them stay dense.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inner = [found for found in graph.dimensions if found.kind in INNER]
    parts: list[Part] = []
    inside: set[str] = set()
    for blocks in graph.of_kind("layers"):
        for unit, (child, block) in enumerate(model.get_submodule(blocks.name).named_children()):
            name = f"{blocks.name}.{child}".lstrip(".")
            own = tuple(found for found in inner if found.places and _within(found, name))
            inside |= {found.name for found in own}
            size = sum(parameter.numel() for parameter in block.parameters())
            parts.append(
                Part(
                    name,
                    own,
                    tuple(layer for layer in layers if f"{layer.name}.".startswith(f"{name}.")),
                    _kind(name, block, own),
                    size,
                    {found.name: _size(found, parameters) / max(size, 1) for found in own},
                    blocks,
                    unit,
                )
            )
    loose = [found for found in inner if found.name not in inside]
    for found in loose:
        size = _size(found, parameters)
        parts.append(Part(found.name, (found,), (), found.name, size, {found.name: 1.0}))
    if not graph.of_kind("layers") and layers:
        # Its parameters are those of the parts above: here only zeros are decided on.
        parts.append(Part("all layers", (), tuple(layers), "all layers", 0))
    return tuple(parts)


def _within(dimension: Dimension, name: str) -> bool:
    return all(place.tensor.startswith(f"{name}.") for place in dimension.places)


def _size(dimension: Dimension, parameters: Mapping[str, nn.Parameter]) -> int:
    """How many parameters belong to the units of a dimension."""
    total = 0.0
    for place in dimension.places:
        if place.tensor in parameters:
            tensor = parameters[place.tensor]
            total += tensor.numel() * min(1.0, place.indices.size / tensor.shape[place.dim])
    return round(total)


def _kind(name: str, block: nn.Module, dimensions: Sequence[Dimension]) -> str:
    shapes = [(key, tuple(tensor.shape)) for key, tensor in block.named_parameters()]
    units = [(found.name.removeprefix(name), found.kind, found.size) for found in dimensions]
    return hashlib.sha256(repr((shapes, units)).encode()).hexdigest()[:16]
