"""How important is each unit? Asked of the inputs of the matrices that read it, on the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._errors import naming
from secateur.calibration import LayerStatistics, Need, Padding, StageSource, gather
from secateur.graph import Dimension
from secateur.layers import Observed
from secateur.shrinking._consumers import Consumer, Consumers
from secateur.solvers import Reader, UnitImportance, UnitOBS, remove_units

_Scores = NDArray[np.float64]


def score_units(
    dimensions: Sequence[Dimension],
    consumers: Consumers,
    importance: UnitImportance,
    gathered: Iterable[tuple[str, LayerStatistics | None]],
    grains: Mapping[str, int],
) -> dict[str, _Scores]:
    """Return by dimension a score for each unit: higher stays.

    Scores are squared errors of what the layers that read the units give out, over all tokens, so that units of
    different blocks, which add to one residual stream, can be compared. With OBS, units are removed one after the
    other, and a unit's score is the error that is left when it and all before it are gone.

    Args:
        dimensions: whose units are scored.
        consumers: of the model.
        importance: of units.
        gathered: names of layers that read units, each with the statistics of its inputs, or None for those that
            nothing is known of. They are not kept longer than it takes to score the units of a dimension.
        grains: by dimension, how many units in a row go together, where it is more than one.
    """
    waiting = {dimension.name: len(consumers.of(dimension)) for dimension in dimensions}
    wanted = {dimension.name: dimension for dimension in dimensions}
    seen: dict[str, list[tuple[Consumer, LayerStatistics | None]]] = {name: [] for name in wanted}
    scores: dict[str, _Scores] = {}
    for layer, statistics in gathered:
        for consumer in consumers.by_layer.get(layer, ()):
            name = consumer.dimension.name
            if name in seen:
                seen[name].append((consumer, statistics))
                if len(seen[name]) == waiting[name]:
                    with naming(name):
                        scores[name] = _scores(wanted[name], seen.pop(name), importance, grains.get(name, 1))
    for name, left in seen.items():  # layers that were never reached
        with naming(name):
            scores[name] = _scores(wanted[name], left, importance, grains.get(name, 1))
    return scores


def by_stage(
    source: StageSource,
    needs: Iterable[Need],
    observed: Observed,
    paddings: Sequence[Padding] | None,
    tell: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, LayerStatistics | None]]:
    """Yield the name of each layer with the statistics of its inputs, one stage after the other.

    Args:
        source: of the stages.
        needs: the statistics.
        observed: what a forward pass showed.
        paddings: what is padding in each batch.
        tell: called with the name of each stage before it runs.
    """
    for index, stage in enumerate(source.stages):
        tell(stage.name)
        gathered = gather(source, index, needs, observed=observed, strict=False, paddings=paddings)
        for layer in stage.layers:
            yield layer.name, gathered.pop(layer.name, None)


def _none(dimension: Dimension) -> _Scores:
    """Nothing is known of what reads the units: all are alike."""
    return np.zeros(dimension.size)


def _scores(
    dimension: Dimension,
    readers: Iterable[tuple[Consumer, LayerStatistics | None]],
    importance: UnitImportance,
    grain: int,
) -> _Scores:
    found = []
    for consumer, statistics in readers:
        if statistics is None and importance.needs:  # an expert that no token reached
            continue
        found.append((consumer, consumer.layer.matrix(), statistics))
    if not found:
        return _none(dimension)
    if isinstance(importance, UnitOBS):
        return _by_removal(dimension, found, importance.damping, grain)
    total = np.zeros(dimension.size)
    for consumer, weight, statistics in found:
        units = torch.from_numpy(consumer.columns)
        total += importance.scores(weight, statistics, units).cpu().numpy()
    return total


def _by_removal(
    dimension: Dimension, found: Sequence[tuple[Consumer, Tensor, LayerStatistics | None]], damping: float, grain: int
) -> _Scores:
    """Scores from removing one unit after the other: what is left in error when it goes."""
    whole = dimension.size // grain
    readers = []
    for consumer, weight, statistics in found:
        assert statistics is not None
        columns = torch.from_numpy(consumer.columns[: whole * grain].reshape(whole, -1))
        readers.append(Reader(weight, statistics.require("gram"), columns))
    groups = dimension.size // dimension.group_size if dimension.group_size else 1
    keep = groups if grain == 1 else 1
    order, costs = remove_units(readers, keep, damping=damping, group_size=dimension.group_size if grain == 1 else 0)
    scores = np.full(whole, np.inf)
    scores[order.cpu().numpy()] = np.maximum.accumulate(costs.cpu().numpy()) if len(costs) else 0.0
    if grain == 1:
        return scores
    spread = np.repeat(scores / grain, grain)
    return np.concatenate([spread, np.full(dimension.size - len(spread), np.inf)])
