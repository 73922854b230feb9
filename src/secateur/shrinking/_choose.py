"""Which units go: the least important ones, as many as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur._errors import RecipeError
from secateur.graph import KINDS, Dimension, Graph

Scores = Mapping[str, NDArray[np.float64]]


def keep_fractions(
    graph: Graph,
    scores: Scores,
    keep: Mapping[str, float],
    *,
    allocation: str,
    steps: Mapping[str, int] | None = None,
    grains: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return by dimension the units that go, given which fraction of each kind stays.

    Args:
        graph: of the model.
        scores: by dimension, one for each unit; higher stays.
        keep: by kind, or by the name of a dimension, the fraction of its units that stay.
        allocation: ``"uniform"``, for the same fraction in each dimension, or ``"global"``.
        steps: by dimension, of what the number of units that stay must be a multiple, where that is more than one.
        grains: by dimension, how many units in a row go together, where it is more than one.
    """
    grains, steps = grains or {}, steps or {}
    removed: dict[str, tuple[int, ...]] = {}
    for key, fraction in keep.items():
        # Of the dimensions of a kind, those that are named have a fraction of their own.
        names = {found.name for found in graph.dimensions} & set(keep) - set(KINDS)
        dimensions = [found for found in graph.dimensions if found.kind == key and found.name not in names]
        if key not in KINDS:
            dimensions = [found for found in graph.dimensions if found.name == key]
        if not dimensions:
            raise RecipeError(
                f"the model has no {key} that could go; it has {', '.join(graph.kinds) or 'nothing'}.\n"
                "Look at what stands in the way: secateur.shrinking.analyze(model, batches).boundaries."
            )
        if allocation == "global":
            removed |= _global(dimensions, scores, fraction, steps, grains)
            continue
        for dimension in dimensions:
            count = kept_count(dimension, fraction, steps.get(dimension.name, 1), grains.get(dimension.name, 1))
            removed[dimension.name] = lowest(
                dimension, scores[dimension.name], dimension.size - count, grains.get(dimension.name, 1)
            )
    return {name: units for name, units in removed.items() if units}


def kept_count(dimension: Dimension, fraction: float, step: int = 1, grain: int = 1) -> int:
    """Return how many units of a dimension stay: a fraction, rounded, at least one and what it takes."""
    step = int(np.lcm(step, grain))
    if dimension.group_size:
        step = int(np.lcm(step, dimension.size // dimension.group_size))
    if step > dimension.size:
        return dimension.size
    least = -(-max(dimension.least, 1, len(dimension.fixed)) // step) * step
    count = max(round(fraction * dimension.size / step) * step, least)
    return min(count, dimension.size)


def lowest(dimension: Dimension, scores: NDArray[np.float64], count: int, grain: int = 1) -> tuple[int, ...]:
    """Return the units with the lowest scores; of equals, the higher index goes.

    Args:
        dimension: of the units.
        scores: one for each unit.
        count: of units that go.
        grain: how many units in a row go together.
    """
    scores = scores.copy()
    scores[list(dimension.fixed)] = np.inf
    if dimension.group_size:  # as many of each group
        groups = dimension.size // dimension.group_size
        each = count // groups
        order = [_first(scores[g * dimension.group_size : (g + 1) * dimension.group_size], each) for g in range(groups)]
        return tuple(sorted(int(unit) + g * dimension.group_size for g, found in enumerate(order) for unit in found))
    if grain > 1:
        whole = dimension.size // grain
        found = _first(scores[: whole * grain].reshape(whole, grain).sum(1), count // grain)
        return tuple(sorted(int(group) * grain + place for group in found for place in range(grain)))
    return tuple(sorted(_first(scores, count).tolist()))


def _first(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    reverse = np.argsort(scores[::-1], kind="stable")
    return (len(scores) - 1 - reverse)[:count]


def _global(
    dimensions: Sequence[Dimension],
    scores: Scores,
    fraction: float,
    multiples: Mapping[str, int],
    grains: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """Units of all dimensions of a kind are compared; each dimension keeps what it must."""
    total = sum(dimension.size for dimension in dimensions)
    wanted = total - round(fraction * total)
    steps: list[tuple[float, int, int]] = []  # cost, dimension, units
    for number, dimension in enumerate(dimensions):
        grain = grains.get(dimension.name, 1)
        one = int(np.lcm(grain, multiples.get(dimension.name, 1)))
        if dimension.group_size:
            one = int(np.lcm(one, dimension.size // dimension.group_size))
        own = scores[dimension.name].copy()
        least = max(dimension.least, 1, len(dimension.fixed))
        available = (dimension.size - least) // one
        ranked = np.sort(own)
        for step in range(available):
            steps.append((float(ranked[step * one : (step + 1) * one].max()), number, one))
    counts = [0] * len(dimensions)
    left = wanted
    for _, number, one in sorted(steps):
        if left < one:
            break
        counts[number] += one
        left -= one
    return {
        dimension.name: lowest(dimension, scores[dimension.name], counts[number], grains.get(dimension.name, 1))
        for number, dimension in enumerate(dimensions)
    }


def fraction_for(size_of: Callable[[float], float], target: float) -> float:
    """Return the largest fraction of units to keep with which a size is at most the target.

    Args:
        size_of: given a fraction of units that stay, returns the fraction of the size that stays; never falls.
        target: fraction of the size.

    Raises:
        RecipeError: even with the fewest units the size is larger.
    """
    if size_of(1.0) <= target:
        return 1.0
    if (smallest := size_of(0.0)) > target:
        raise RecipeError(
            f"a target of {target:.4g} cannot be reached: with as few units as can be, {smallest:.4g} is left.\n"
            "Give a larger target, or keep={'layers': ..., 'ffn': ...}, which says of each kind how much stays."
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if size_of(middle) <= target:
            low = middle
        else:
            high = middle
    return low


def parameters_left(model: nn.Module, graph: Graph, removed: Mapping[str, Sequence[int]]) -> int:
    """Return how many parameters a model would have without some units and blocks."""
    gone: dict[int, list[set[int]]] = {}
    sizes: dict[int, tuple[int, ...]] = {}
    names = dict(model.named_parameters(remove_duplicate=False))
    for parameter in names.values():
        sizes[id(parameter)] = tuple(parameter.shape)
        gone[id(parameter)] = [set() for _ in parameter.shape]
    dropped: list[str] = []
    for name, units in removed.items():
        dimension = graph[name]
        if dimension.kind == "layers":
            blocks = list(model.get_submodule(name).named_children())
            dropped += [f"{name}.{blocks[unit][0]}.".lstrip(".") for unit in units]
        for place in dimension.places:
            if place.tensor in names:
                gone[id(names[place.tensor])][place.dim].update(place.of(units).tolist())
    alive = {
        id(parameter) for name, parameter in names.items() if not any(name.startswith(prefix) for prefix in dropped)
    }
    return sum(
        int(np.prod([size - len(lost) for size, lost in zip(shape, gone[key], strict=True)]))
        for key, shape in sizes.items()
        if key in alive
    )
