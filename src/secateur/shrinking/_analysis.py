"""What could be removed from a model, for a user to read."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.calibration import Forward, call_model
from secateur.graph import Dimension, Graph
from secateur.reports import RemovableDimension, ShrinkAnalysis
from secateur.shapes import structure_hash
from secateur.shrinking._size import model_size


def describe(model: nn.Module, graph: Graph, batch: Any = None, forward: Forward = call_model) -> ShrinkAnalysis:
    """Return what could be removed from a model: how many units of what size, and what stands in the way of others.

    Args:
        model: that the graph was found in.
        graph: what was found.
        batch: to count multiply-adds on, on the model's device; None to count none.
        forward: how to call the model on the batch.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return ShrinkAnalysis(
        model_name=type(model).__name__,
        model_hash=structure_hash(model),
        dimensions=tuple(
            RemovableDimension(
                found.name, found.kind, found.size, _parameters(found, sizes, shapes), found.group_size, found.notes
            )
            for found in graph.dimensions
        ),
        boundaries=graph.boundaries,
        size=model_size(model, batch, forward),
        seconds=graph.seconds,
    )


def _parameters(found: Dimension, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers in the parameters of one unit; of blocks, in the mean."""
    if found.kind == "layers":
        prefix = f"{found.name}." if found.name else ""
        return sum(size for name, size in sizes.items() if name.startswith(prefix)) // max(found.size, 1)
    return sum(
        sizes[place.tensor] // max(shapes[place.tensor][place.dim], 1) * place.width
        for place in found.places
        if place.tensor in sizes  # buffers are no parameters, and a shared parameter counts once
    )
