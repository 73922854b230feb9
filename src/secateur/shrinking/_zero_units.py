"""Units that are zero already: nobody reads them, or they give out a constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.calibration import LayerStatistics
from secateur.graph import Dimension, Graph
from secateur.shrinking._consumers import Consumer, Consumers


@dataclass
class ZeroUnits:
    """Units that can go because they are zero.

    Args:
        units: by dimension, their numbers.
        constants: by the name of a layer, float64 ``[in]``: what such units add to its inputs, for its bias.
        notes: what could not go, and why.
    """

    units: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def zero_units(
    model: nn.Module, graph: Graph, consumers: Consumers, gathered: Iterable[tuple[str, LayerStatistics | None]]
) -> ZeroUnits:
    """Return the units that nobody reads, and those whose matrices are zero and that therefore give out a constant.

    Args:
        model: of the graph.
        graph: with the units.
        consumers: of the model.
        gathered: names of layers that read units, each with ``gram`` and ``input_mean`` of its inputs.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    found = ZeroUnits()
    statistics = dict(gathered)
    for dimension in graph.dimensions:
        if dimension.kind in ("layers", "experts", "hidden"):
            continue
        unread = torch.ones(dimension.size, dtype=torch.bool)
        for place in dimension.inputs:
            unread &= _zero_at(tensors[place.tensor], place.dim, torch.from_numpy(place.indices))
        made = [p for p in dimension.places if not p.is_input and tensors[p.tensor].ndim > 1]
        unmade = torch.ones(dimension.size, dtype=torch.bool) if made and dimension.kind != "heads" else ~unread & False
        for place in made:
            if tensors[place.tensor].ndim > 1 and isinstance(tensors[place.tensor], nn.Parameter):
                unmade &= _zero_at(tensors[place.tensor], place.dim, torch.from_numpy(place.indices))
        if unmade.any() and not consumers.unknown.get(dimension.name):
            unmade &= _fold(dimension, consumers.of(dimension), unmade & ~unread, statistics, found)
        gone = (unread | unmade).nonzero().flatten().tolist()
        if dimension.group_size:
            gone = _evened(dimension, gone, found)
        if len(gone) >= dimension.size:
            found.notes.append(f"{dimension.name}: all {dimension.size} units are zero; one was kept")
            gone = gone[1:]
        if gone:
            found.units[dimension.name] = tuple(gone)
    return found


def _zero_at(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Which units are zero in a tensor, bool ``[units]``."""
    others = [axis for axis in range(tensor.ndim) if axis != dim]
    zero = (tensor == 0).all(dim=others[0]) if len(others) == 1 else (tensor == 0).movedim(dim, 0).flatten(1).all(1)
    return zero.cpu()[indices].all(1)


def _fold(
    dimension: Dimension,
    readers: Iterable[Consumer],
    candidates: Tensor,
    statistics: Mapping[str, LayerStatistics | None],
    found: ZeroUnits,
) -> Tensor:
    """Which candidates can go because each gives out one value for every input, that biases can add instead."""
    can = torch.ones(dimension.size, dtype=torch.bool)
    parts: list[tuple[Consumer, Tensor]] = []
    for consumer in readers:
        known = statistics.get(consumer.layer.name)
        columns = torch.from_numpy(consumer.columns)
        if known is None or len(known.require("gram")) > 1:
            can &= ~candidates
            continue
        mean = known.require("input_mean")[0].double().cpu()
        squares = known.require("gram")[0].diagonal().double().cpu()
        spread = squares - known.tokens * mean.square()
        constant = spread <= 1e-5 * squares.clamp(min=1e-30)
        bias = getattr(consumer.layer.modules[0], "bias", None)
        has_bias = isinstance(bias, nn.Parameter) and not consumer.layer.is_part
        can &= (constant & ((mean.abs() < 1e-12) | has_bias))[columns].all(1) | ~candidates
        parts.append((consumer, mean))
    stay = int((candidates & ~can).sum())
    if stay:
        found.notes.append(
            f"{dimension.name}: {stay} units have zero weights but stay, because what they give out is not one "
            "value that a bias could add"
        )
    for consumer, mean in parts:
        columns = torch.from_numpy(consumer.columns)[candidates & can].flatten()
        constants = found.constants.setdefault(consumer.layer.name, torch.zeros_like(mean))
        constants[columns] = mean[columns]
    return can


def _evened(dimension: Dimension, gone: list[int], found: ZeroUnits) -> list[int]:
    """As many of each group as the group with the fewest has."""
    groups: dict[int, list[int]] = {group: [] for group in range(dimension.size // dimension.group_size)}
    for unit in gone:
        groups[unit // dimension.group_size].append(unit)
    fewest = min(len(units) for units in groups.values())
    if fewest * len(groups) < len(gone):
        stay = len(gone) - fewest * len(groups)
        found.notes.append(f"{dimension.name}: {stay} zero units stay, so that all groups lose as many")
    return sorted(unit for units in groups.values() for unit in units[:fewest])
