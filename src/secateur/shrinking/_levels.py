"""What a dimension would become at several sizes: which units would go, and the weights that make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur._errors import naming
from secateur._types import Weight
from secateur.calibration import LayerStatistics
from secateur.graph import Dimension
from secateur.layers import Layer
from secateur.shrinking._choose import kept_count, lowest
from secateur.shrinking._consumers import Consumer, Consumers, removed_columns
from secateur.shrinking._score import score_units
from secateur.solvers import UnitOBS, refit_columns


@dataclass(frozen=True, eq=False)
class Level:
    """A dimension at one size.

    Args:
        kept: how many units stay.
        units: that go.
        changes: the layers that read them, each with the weight that it would get.
    """

    kept: int
    units: tuple[int, ...]
    changes: tuple[tuple[Layer, Weight], ...]


@torch.no_grad()
def fitted_levels(
    dimension: Dimension,
    readers: Sequence[Consumer],
    statistics: Mapping[str, LayerStatistics],
    fractions: Sequence[float],
) -> list[Level]:
    """Return a dimension at several sizes: without the units whose removal costs least, and with what stays fitted.

    The model is not changed. It is what :func:`secateur.shrink_` does to a dimension alone, but for biases.

    Args:
        dimension: whose units go.
        readers: the layers that read them.
        statistics: of the inputs of these layers, by name: ``gram``. A layer that is not there was never reached.
        fractions: of the units that stay, one for each size.
    """
    by_layer: dict[str, tuple[Consumer, ...]] = {}
    for reader in readers:
        by_layer[reader.layer.name] = (*by_layer.get(reader.layer.name, ()), reader)
    known = [(name, statistics.get(name)) for name in by_layer]
    scores = score_units([dimension], Consumers(by_layer, {}), UnitOBS(), known, {})[dimension.name]
    levels = []
    for fraction in fractions:
        kept = kept_count(dimension, fraction)
        units = lowest(dimension, scores, dimension.size - kept)
        changes = []
        for name, found in by_layer.items():
            layer, gone = found[0].layer, removed_columns(found, {dimension.name: units})
            weight = layer.matrix()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            if name in statistics and gone.any():
                with naming(layer.title):
                    weight = refit_columns(weight, statistics[name], ~gone, bias=False).weight
            else:
                weight[:, gone.to(weight.device)] = 0
            changes.append((layer, weight.to(layer.parameter.dtype)))
        levels.append(Level(kept, units, tuple(changes)))
    return levels
