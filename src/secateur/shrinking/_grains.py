"""How many units must go together: so that the pattern of a pruned layer stays, and that sizes are multiples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.graph import Dimension, Graph
from secateur.layers import Layer
from secateur.patterns import NM, Block, SparsityPattern, satisfied
from secateur.reports import Report, Stage
from secateur.shrinking._consumers import Consumers

_ALIGNED = 8  # neurons of experts in a stack


def grains_of(
    graph: Graph, layers: Iterable[Layer], consumers: Consumers, history: Iterable[Stage]
) -> tuple[Graph, dict[str, int]]:
    """Return by dimension how many units in a row go together, and the graph without what patterns do not let go.

    A matrix with N:M sparsity loses whole groups of m columns, and one of tiles whole columns or rows of tiles.

    Args:
        graph: of the model.
        layers: all layers that make or read units.
        consumers: of the model.
        history: reports of pruning, which say the pattern of each layer. Without one, the zeros of a layer say it.
    """
    recorded = {
        entry.name: SparsityPattern.parse(entry.pattern)
        for report in history
        if isinstance(report, Report)
        for entry in report.layers
    }
    patterns = {layer.name: found for layer in layers if (found := _pattern(layer, recorded)) is not None}
    by_tensor = {layer.parameter_name: (layer, patterns[layer.name]) for layer in layers if layer.name in patterns}
    if not patterns:
        return graph, {}
    grains: dict[str, int] = {}
    dimensions = []
    for dimension in graph.dimensions:
        steps, problem = [1], ""
        for consumer in consumers.of(dimension):
            if (pattern := patterns.get(consumer.layer.name)) is not None:
                step = _step(consumer.columns, pattern.m if isinstance(pattern, NM) else pattern.width)
                steps.append(step)
                problem = problem or ("" if step else f"{consumer.layer.name} has the pattern {pattern}")
        for place in dimension.places:
            entry = by_tensor.get(place.tensor)
            if entry is not None and not place.is_input and place.dim == 0 and isinstance(entry[1], Block):
                step = _step(place.indices, entry[1].height)
                steps.append(step)
                problem = problem or ("" if step else f"{entry[0].name} has the pattern {entry[1]}")
        if problem or (dimension.group_size and max(steps) > 1):
            note = f"nothing can go: {problem or 'patterns'}, whose groups units do not fill. Shrink first, then prune"
            every = tuple(range(dimension.size))
            dimensions.append(replace(dimension, fixed=every, least=dimension.size, notes=(note,)))
            continue
        if max(steps) > 1:
            grains[dimension.name] = int(np.lcm.reduce(steps))
        dimensions.append(dimension)
    return replace(graph, dimensions=tuple(dimensions)), grains


def _pattern(layer: Layer, recorded: Mapping[str, SparsityPattern]) -> NM | Block | None:
    """The pattern of a layer, if it holds columns or rows together."""
    if layer.name in recorded:
        found = recorded[layer.name]
        return found if isinstance(found, NM | Block) else None
    zero = layer.matrix() == 0
    # Rows and columns that are zero as a whole satisfy any pattern, and hold nothing together.
    inner = zero[~zero.all(1)][:, ~zero.all(0)]
    if not inner.numel() or float(inner.double().mean()) < 0.2:
        return None
    return next((found for found in satisfied(zero) if isinstance(found, NM | Block)), None)


def _step(indices: NDArray[np.int64], width: int) -> int:
    """How many units in a row fill whole groups of a width; 0 if they do not."""
    own = indices.shape[1]
    step = int(np.lcm(own, width)) // own
    if len(indices) % step:
        return 0
    groups = np.sort(indices.reshape(len(indices) // step, -1), axis=1)
    runs = groups.reshape(len(groups), -1, width)
    is_whole = (runs[..., 0] % width == 0) & (runs[..., -1] - runs[..., 0] == width - 1)
    return step if bool(is_whole.all()) else 0


def step_of(model: nn.Module, dimension: Dimension, round_to: int) -> int:
    """Return of what the number of units of a dimension that stay must be a multiple."""
    if dimension.kind not in ("ffn", "channels", "hidden"):
        return 1
    # Grouped products of stacked experts take strides of whole 16 bytes.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stacked = dimension.kind == "ffn" and any(
        place.tensor in parameters and parameters[place.tensor].ndim == 3 for place in dimension.places
    )
    return int(np.lcm(round_to, _ALIGNED)) if stacked else round_to
