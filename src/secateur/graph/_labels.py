"""Channel labels: which entries along the dimensions of a tensor go together, whatever tensor they are in.

Every index along every dimension of every parameter is an *atom*. A tensor that is computed carries *layers* of atoms:
arrays of its number of dimensions, with one entry along each dimension that they do not vary in. To remove an atom is
to remove all entries that have its label. What an operation does to a model is said in three ways: labels move as the
entries do, atoms are united because they can only go together, or they are fixed because they cannot go at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Layer: TypeAlias = NDArray[np.int64]
FIXED = 0  # the atom of entries that no parameter made, which cannot go


@dataclass(frozen=True)
class Labels:
    """What is known of a tensor.

    Args:
        layers: of atoms, each of the tensor's number of dimensions, with size 1 where all entries have the same.
        parametric: whether only parameters and buffers are behind the tensor.
        uniform: whether all its entries are equal, so that it may have any size.
        weak: whether its labels come from buffers alone, such as a table of rotations: constants, which give way.
    """

    layers: tuple[Layer, ...] = ()
    parametric: bool = False
    uniform: bool = False
    weak: bool = False

    def moved(self, layers: Iterable[Layer]) -> Labels:
        """Return the labels of the same entries elsewhere."""
        return replace(self, layers=tuple(layer for layer in layers if layer.size > 1))


@dataclass(frozen=True)
class Event:
    """Why atoms were united or fixed."""

    atoms: Layer
    operation: str
    reason: str


@dataclass(frozen=True)
class _Cut:
    event: Event
    ranges: tuple[range, ...]


class Ledger:
    """The atoms of a model, and which of them go together."""

    def __init__(self) -> None:
        self._count = 1
        self._edges: list[NDArray[np.int64]] = []
        self.events: list[Event] = []
        self._fixed: list[Layer] = []
        self._inputs: list[Layer] = []
        self._attended: list[Layer] = []
        self._rearranged: list[Layer] = []
        self._cuts: list[_Cut] = []
        self._grids: list[Layer] = []

    def new(self, count: int) -> Layer:
        """Return new atoms."""
        self._count += count
        return np.arange(self._count - count, self._count, dtype=np.int64)

    def unite(self, a: Layer, b: Layer) -> None:
        """Say that atoms go together, entry by entry after broadcasting."""
        pairs = np.stack([side.ravel() for side in np.broadcast_arrays(a, b)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.size:
            self._edges.append(np.unique(pairs, axis=1))

    def fix(self, layer: Layer, operation: str, reason: str) -> None:
        """Say that atoms cannot go."""
        self.note(layer, operation, reason)
        self._fixed.append(np.unique(layer))

    def note(self, layer: Layer, operation: str, reason: str) -> None:
        """Remember why something was done to atoms."""
        self.events.append(Event(np.unique(layer), operation, reason))

    def fuse(self, layer: Layer, axes: Sequence[int], operation: str, reason: str) -> Layer:
        """Unite atoms along some axes. Return the layer that is left. If all of it is one, that is fixed.

        Args:
            layer: of any number of dimensions.
            axes: along which entries cannot be told apart any more.
            operation, reason: why.
        """
        axes = tuple(axis for axis in axes if layer.shape[axis] > 1)
        if not axes:
            return layer
        left: Layer = layer.min(axis=axes, keepdims=True)
        self.note(layer, operation, reason)
        self.unite(layer, left)
        if left.size == 1:
            self._fixed.append(left.ravel())
        return left

    def hold(self, layer: Layer, axes: Sequence[int], operation: str, reason: str) -> Layer:
        """Unite atoms as ``fuse`` does, and return a layer that still varies along its axes if all of it is fixed.

        So what it meets later, such as the weights that read a residual stream, is known to belong to it.
        """
        left = self.fuse(layer, axes, operation, reason)
        return np.broadcast_to(left, layer.shape) if left.size == 1 else left

    def reads(self, layer: Layer) -> None:
        """Say that these atoms of a parameter are its input side: it multiplies what others give, and sums over it."""
        self._inputs.append(np.unique(layer))

    def rearranged(self, layer: Layer) -> None:
        """Say that a dimension with these atoms was split or joined with others, to sizes that somebody may keep."""
        self._rearranged.append(np.unique(layer))

    def attends(self, layer: Layer) -> None:
        """Say that two computed tensors are multiplied along these atoms, as attention does."""
        self._attended.append(np.unique(layer))

    def cut(self, layer: Layer, axis: int, ranges: Sequence[range], operation: str, reason: str) -> None:
        """Say that ranges are cut out along an axis, whose ends may be numbers that do not follow the size."""
        rows = np.moveaxis(layer, axis, -1).reshape(-1, layer.shape[axis])
        self._cuts.append(_Cut(Event(rows, operation, reason), tuple(ranges)))

    def grid(self, layer: Layer) -> None:
        """Say that entries were arranged as the axes of this array, so that only whole slices of it can go."""
        self._grids.append(layer)

    def merged(self, layers: Iterable[Layer]) -> tuple[Layer, ...]:
        """Return as few layers of one tensor: those that vary along a common axis are united."""
        found: list[Layer] = []
        for layer in layers:
            if layer.size == 1:
                continue
            kept = layer
            for other in [other for other in found if _share_axis(other, kept)]:
                found = [entry for entry in found if entry is not other]
                self.unite(other, kept)
                kept = _coarser(self, other, kept)
            if kept.size > 1:
                found.append(kept)
        return tuple(found)

    def roots(self) -> NDArray[np.int64]:
        """Return for every atom the smallest one that it goes together with."""
        self._share_cuts()
        roots = self._components()
        while True:  # to unite along one grid may break another
            before = len(self._edges)
            for grid in self._grids:
                self._make_regular(roots[grid])
            if len(self._edges) == before:
                return roots
            roots = self._components()

    def _make_regular(self, grid: Layer) -> None:
        """Unite entries of a grid until they depend on their place along one axis only."""
        axes = [axis for axis in range(grid.ndim) if grid.shape[axis] > 1 and (grid != grid.take([0], axis)).any()]
        if len(axes) < 2:
            return
        longest = max(axes, key=lambda axis: grid.shape[axis])
        others = tuple(axis for axis in axes if axis != longest)
        self.note(grid, "aten.view", "a dimension is split in two, so that only whole slices of it can go")
        self.unite(grid, grid.min(axis=others, keepdims=True))

    def _components(self) -> NDArray[np.int64]:
        parent = np.arange(self._count, dtype=np.int64)
        if not self._edges:
            return parent
        edges = np.unique(np.concatenate(self._edges, axis=1), axis=1)
        while True:  # each round hooks the larger of two roots under the smaller, then makes all trees flat
            a, b = parent[edges[0]], parent[edges[1]]
            differ = a != b
            if not differ.any():
                return parent
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(parent, high, low)
            while not np.array_equal(flat := parent[parent], parent):
                parent = flat

    def marked(self, roots: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which atoms are input sides, and by root which atoms attention multiplies along."""
        inputs, attended = np.zeros(self._count, bool), np.zeros(self._count, bool)
        for layer in self._inputs:
            inputs[layer] = True
        for layer in self._attended:
            attended[roots[layer]] = True
        return inputs, attended

    def rearranged_roots(self, roots: NDArray[np.int64]) -> frozenset[int]:
        """Return by root which atoms lie along a dimension that was split or joined with others."""
        found = [roots[layer] for layer in self._rearranged]
        return frozenset(np.unique(np.concatenate(found)).tolist()) if found else frozenset()

    def fixed_roots(self, roots: NDArray[np.int64]) -> frozenset[int]:
        """Return by root which atoms cannot go."""
        found = [roots[layer] for layer in self._fixed]
        return frozenset({int(roots[FIXED]), *(np.unique(np.concatenate(found)).tolist() if found else ())})

    def cut_roots(self, roots: NDArray[np.int64]) -> dict[int, Event]:
        """Return by root which range was cut out of entries that do not all go together."""
        found: dict[int, Event] = {}
        for cut in self._cuts:
            rows = roots[cut.event.atoms]
            for root in np.unique(rows[(rows != rows[:, :1]).any(axis=1)]).tolist():
                found.setdefault(root, cut.event)
        return found

    def _share_cuts(self) -> None:
        """Unite the parts of what was cut into equal parts: each of them loses the same."""
        ranges: dict[bytes, set[range]] = {}
        for cut in self._cuts:
            ranges.setdefault(cut.event.atoms.tobytes(), set()).update(cut.ranges)
        for cut in self._cuts:
            rows = cut.event.atoms
            parts = ranges[rows.tobytes()]
            length = len(next(iter(parts)))
            if rows.shape[1] % length == 0 and all(len(part) == length and part.start % length == 0 for part in parts):
                grid = rows.reshape(len(rows), -1, length)
                self.unite(grid, grid.min(axis=1, keepdims=True))


def _share_axis(a: Layer, b: Layer) -> bool:
    return any(x > 1 and y > 1 for x, y in zip(a.shape, b.shape, strict=True))


def _coarser(ledger: Ledger, a: Layer, b: Layer) -> Layer:
    """Of two layers that were united, one that varies only where both do."""
    axes = tuple(axis for axis in range(a.ndim) if a.shape[axis] > 1 and b.shape[axis] == 1)
    if not axes:
        return a
    left: Layer = a.min(axis=axes, keepdims=True)
    ledger.unite(a, left)
    return left


def aligned(layer: Layer, ndim: int) -> Layer:
    """Return a layer with axes of size 1 in front, as broadcasting adds them."""
    return layer.reshape((1,) * (ndim - layer.ndim) + layer.shape)


def reshaped(layer: Layer, old: Sequence[int], new: Sequence[int]) -> tuple[Layer, tuple[tuple[int, ...], ...]]:
    """Return a layer as ``view`` rearranges its tensor, and the groups of new axes that one old axis was split into.

    Args:
        layer: of a tensor of the old shape.
        old, new: shapes with the same number of entries.
    """
    shape: list[int] = []
    full: list[int] = []
    splits: list[tuple[int, ...]] = []
    rearranged: tuple[int, ...] = ()
    for old_axes, new_axes in _groups(old, new):
        varies = [axis for axis in old_axes if layer.shape[axis] > 1]
        full += [old[axis] if varies else 1 for axis in old_axes]
        begin = len(shape)
        shape += [new[axis] if varies else 1 for axis in new_axes]
        wide = tuple(begin + place for place, axis in enumerate(new_axes) if new[axis] > 1)
        if varies and len(wide) > 1:
            splits.append(wide)
        if varies and len(old_axes) != len(new_axes):
            rearranged += wide
    moved = np.broadcast_to(layer, full).reshape(shape)
    return compressed(moved, rearranged), tuple(splits)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have the same number of entries."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i], [j]) if i < len(old) and j < len(new) else ([i], []) if i < len(old) else ([], [j])
        a, b = (old[i] if left else 1), (new[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while a != b:
            if (a < b and i < len(old)) or j >= len(new):
                a, left, i = a * old[i], [*left, i], i + 1
            else:
                b, right, j = b * new[j], [*right, j], j + 1
        yield left, right


def compressed(layer: Layer, axes: Iterable[int]) -> Layer:
    """Return a layer with size 1 along each of some axes in which all entries are the same."""
    for axis in axes:
        first = layer.take([0], axis) if layer.shape[axis] > 1 else layer
        if layer.shape[axis] > 1 and (layer == first).all():
            layer = first
    return layer
