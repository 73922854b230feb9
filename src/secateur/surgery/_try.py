"""Try out what a trace cannot know: whether code that counts units follows when some go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from secateur._errors import SparsityError
from secateur.calibration import Forward
from secateur.graph import Dimension, Graph, Removal
from secateur.reports import Boundary
from secateur.surgery._proof import prove
from secateur.surgery._remove import remove_
from secateur.surgery._saved import Saved

_MANY = 8


def tried(model: nn.Module, graph: Graph, batch: Any, forward: Forward) -> Graph:
    """Return a graph without the dimensions of which no unit can go, because the code around them does not follow.

    One unit of each such dimension is removed, the smaller model is compared, and all is put back. Dimensions that look
    alike, as those of a model's blocks do, are tried once.

    Args:
        model: of the graph; as it was afterwards.
        graph: what a trace found.
        batch: of inputs.
        forward: how to call the model on it.
    """
    results: dict[object, str] = {}
    dimensions, boundaries = [], []
    for dimension in graph.dimensions:
        problem = ""
        if _is_doubtful(model, dimension):
            key = _looks(model, dimension)
            if key not in results:
                results[key] = _problem(model, graph, dimension, batch, forward)
            problem = results[key]
        if not problem:
            dimensions.append(replace(dimension, cut="", is_doubtful=False))
            continue
        operation, _, reason = dimension.cut.partition(": ")
        for place in dimension.places:
            size = _tensor(model, place.tensor).shape[place.dim]
            why = f"{reason}; {problem}" if reason else problem
            boundaries.append(Boundary(place.tensor, place.dim, size, operation, why))
    return replace(graph, dimensions=tuple(dimensions), boundaries=(*graph.boundaries, *boundaries))


def _is_doubtful(model: nn.Module, dimension: Dimension) -> bool:
    """Whether code may count units. Between convolutions, whose sizes differ from block to block, it seldom does."""
    if dimension.kind in ("layers", "hidden") or dimension.size <= max(dimension.least, 1):
        return False
    owners = {place.tensor.rpartition(".")[0] for place in dimension.places}
    return dimension.is_doubtful or not any(isinstance(model.get_submodule(owner), _ConvNd) for owner in owners)


def _looks(model: nn.Module, dimension: Dimension) -> object:
    """What dimensions have in common that behave alike."""
    places = tuple(
        (
            type(model.get_submodule(place.tensor.rpartition(".")[0])),
            place.tensor.rpartition(".")[2],
            tuple(_tensor(model, place.tensor).shape),
            place.dim,
            place.width,
        )
        for place in dimension.places
    )
    return dimension.kind, dimension.size, places


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(owner), last)
    assert isinstance(found, torch.Tensor)
    return found


def _problem(model: nn.Module, graph: Graph, dimension: Dimension, batch: Any, forward: Forward) -> str:
    """Why a unit cannot go, or ``""``."""
    step = dimension.group_size
    # Some kernels take sizes that are multiples of 8 only, so that as many go of what has many.
    fewest = 1 if dimension.size < 2 * _MANY or dimension.kind in ("heads", "experts") else _MANY
    units = tuple(range(step - 1, dimension.size, step) if step else range(dimension.size - fewest, dimension.size))
    with _unread(model, dimension, units):
        try:
            undo = remove_(model, graph, Removal({dimension.name: units}), batch, forward)
        except SparsityError as error:
            return str(error).partition("\n")[0]
        try:
            prove(undo, [batch], forward)
        except SparsityError as error:
            return str(error).partition("\n")[0]
        undo.restore()
    return ""


@contextmanager
def _unread(model: nn.Module, dimension: Dimension, units: tuple[int, ...]) -> Iterator[None]:
    """Zeros, for a while, in what reads some units."""
    saved = Saved()
    try:
        zero_(model, dimension, units, saved)
        yield
    finally:
        saved.restore()


@torch.no_grad()
def zero_(model: nn.Module, dimension: Dimension, units: tuple[int, ...], saved: Saved) -> None:
    """Write zeros into all that reads some units, after saving it."""
    for place in dimension.inputs:
        tensor = _tensor(model, place.tensor)
        saved.keep([tensor])
        index = torch.from_numpy(place.of(np.asarray(units))).to(tensor.device)
        tensor.index_fill_(place.dim, index, 0)
