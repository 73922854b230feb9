"""What does each thing that may be done to a model do to its output? Measured one by one, on the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._types import Progress
from secateur.calibration import Forward, LayerStatistics, Padding, gather, observe, quiet, replayed
from secateur.graph import Dimension, Graph, without
from secateur.layers import Layer
from secateur.patterns import SparsityPattern
from secateur.planning._means import Choice, Means
from secateur.planning._parts import Part
from secateur.pruning import OutputEffect
from secateur.shrinking import Consumer, find_consumers, fitted_levels
from secateur.solvers import LayerProblem, SparseGPT

_ROWS = 8  # of a batch, on which the model is run for each thing: the whole batch tells little more
_TRIED = 3  # blocks that are tried as the next one to go: those that matter least by themselves


@dataclass(frozen=True)
class Depth:
    """Blocks that go together.

    Args:
        gone: by the name of a list of blocks, the numbers of those that go.
        loss: what this does to the output, as measured with all of them gone.
    """

    gone: Mapping[str, tuple[int, ...]]
    loss: float

    @property
    def number(self) -> int:
        """How many blocks go."""
        return sum(map(len, self.gone.values()))


@dataclass(frozen=True)
class Effects:
    """Losses, in the unit of :class:`secateur.pruning.OutputEffect`.

    Args:
        depths: without any number of blocks, from none to all but one.
        kept: by the name of a dimension and the fraction of its units that stays.
        zeros: by the name of a part, the pattern and the sparsity of its layers.
    """

    depths: tuple[Depth, ...] = (Depth({}, 0.0),)
    kept: Mapping[tuple[str, float], float] = field(default_factory=dict)
    zeros: Mapping[tuple[str, str, float], float] = field(default_factory=dict)

    def of(self, part: Part, choice: Choice) -> float:
        """Return what a choice for a part that stays does to the output. Losses add up."""
        lost = sum(
            self.kept.get((found.name, fraction), 0.0)
            for found, fraction in zip(part.dimensions, choice.kept, strict=True)
        )
        return lost + (self.zeros.get((part.name, choice.pattern, choice.sparsity), 0.0) if choice.pattern else 0.0)


def few_rows(batch: Any, rows: int = _ROWS) -> Any:
    """Return the first rows of a batch."""
    return tree_map(lambda leaf: leaf[:rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def measure_effects(
    model: nn.Module,
    graph: Graph,
    parts: Sequence[Part],
    means: Means,
    batches: Sequence[Any],
    paddings: Sequence[Padding],
    small: tuple[Sequence[Any], Sequence[Padding]],
    forward: Forward,
    progress: Progress,
) -> Effects:
    """Measure what every means does to every part alone. The model is as before.

    Statistics are those of the dense model, gathered in one pass, one block after the other, and only those of one
    block are kept. Blocks are also taken out together, each time one more.

    Args:
        model: dense.
        graph: what can go.
        parts: to decide on.
        means: that are allowed.
        batches: to learn from.
        paddings: of each.
        small: batches on which the output is compared, and their paddings.
        forward: how to call the model on a batch.
        progress: called with a description, and how much of how much is done.
    """
    with quiet(model):
        effect = OutputEffect(model, small[0], small[1], forward)
        depths = _depths(model, graph, effect, progress) if "layers" in means.allowed else [Depth({}, 0.0)]
        kept: dict[tuple[str, float], float] = {}
        zeros: dict[tuple[str, str, float], float] = {}
        steps = count(1)
        for what, statistics in _by_stage(model, graph, parts, batches, paddings, forward):
            for dimension, readers in what.dimensions:
                progress("trying sizes of each part", next(steps), what.total)
                fractions = means.fractions(dimension.kind)
                levels = fitted_levels(dimension, readers, statistics, fractions)
                found = [effect(level.changes) for level in levels]
                # Less stays: more is lost, whatever the few rows of the comparison say.
                for fraction, loss in zip(fractions, torch.tensor(found).cummax(0).values.tolist(), strict=True):
                    kept[dimension.name, fraction] = loss
            for part in what.parts:
                for pattern, sparsity in means.zeros:
                    progress("trying zeros in each part", next(steps), what.total)
                    loss = _loss_of_zeros(part, pattern, sparsity, statistics, effect)
                    if loss is not None:
                        zeros[part.name, pattern, sparsity] = loss
    return Effects(tuple(depths), kept, zeros)


def _depths(model: nn.Module, graph: Graph, effect: OutputEffect, progress: Progress) -> list[Depth]:
    """Take out one block more each time: of those that matter least alone, the one that is missed least."""
    lists = graph.of_kind("layers")
    blocks = [(found, unit) for found in lists for unit in range(found.size) if unit not in found.fixed]
    alone: dict[tuple[str, int], float] = {}

    def loss(gone: Sequence[tuple[Dimension, int]]) -> float:
        together: dict[str, tuple[Dimension, list[int]]] = {}
        for found, unit in gone:
            together.setdefault(found.name, (found, []))[1].append(unit)
        with without(model, together.values()):
            return effect([])

    for number, (found, unit) in enumerate(blocks):
        progress("trying the model without each block", number, len(blocks))
        alone[found.name, unit] = loss([(found, unit)])
    depths, gone = [Depth({}, 0.0)], list[tuple[Dimension, int]]()
    while blocks:
        left = {found.name: found.size - sum(other.name == found.name for other, _ in gone) for found in lists}
        able = [entry for entry in blocks if entry not in gone and left[entry[0].name] > max(1, entry[0].least)]
        if not able:
            break
        able = sorted(able, key=lambda entry: alone[entry[0].name, entry[1]])[:_TRIED]
        progress("trying the model without several blocks", len(gone), len(blocks))
        lost = {number: loss([*gone, entry]) for number, entry in enumerate(able)}
        best = min(lost, key=lambda number: lost[number])
        gone.append(able[best])
        numbers: dict[str, tuple[int, ...]] = {}
        for found, unit in gone:
            numbers[found.name] = tuple(sorted((*numbers.get(found.name, ()), unit)))
        depths.append(Depth(numbers, lost[best]))
    return depths


@dataclass(frozen=True, eq=False)
class _Stage:
    """What can be tried with the statistics of one stage."""

    dimensions: Sequence[tuple[Dimension, list[Consumer]]]
    parts: Sequence[Part]
    total: int


def _by_stage(
    model: nn.Module,
    graph: Graph,
    parts: Sequence[Part],
    batches: Sequence[Any],
    paddings: Sequence[Padding],
    forward: Forward,
) -> Iterator[tuple[_Stage, Mapping[str, LayerStatistics]]]:
    """Yield what can be tried once the statistics of a stage are there, and these."""
    observed = observe(model, batches[:1], forward)
    consumers = find_consumers(model, graph, observed)
    readers = {found.name: consumers.of(found) for part in parts for found in part.dimensions}
    needed: dict[str, Layer] = {layer.name: layer for part in parts for layer in part.layers}
    needed |= {reader.layer.name: reader.layer for found in readers.values() for reader in found}
    waiting = [found for part in parts for found in part.dimensions]
    pruned = [part for part in parts if part.layers]
    total = len(waiting) + len(pruned)
    if not needed:
        return
    source = replayed(model, list(batches), needed.values(), forward)
    known: dict[str, LayerStatistics] = {}
    seen: set[str] = set()
    for index, stage in enumerate(source.stages):
        known |= gather(source, index, {"gram", "input_mean"}, observed=observed, strict=False, paddings=paddings)
        seen |= {layer.name for layer in stage.layers}
        ready = [found for found in waiting if {reader.layer.name for reader in readers[found.name]} <= seen]
        able = [part for part in pruned if {layer.name for layer in part.layers} <= seen]
        waiting = [found for found in waiting if found not in ready]
        pruned = [part for part in pruned if part not in able]
        yield _Stage([(found, readers[found.name]) for found in ready], able, total), known
        later = {reader.layer.name for found in waiting for reader in readers[found.name]}
        later |= {layer.name for part in pruned for layer in part.layers}
        known = {name: found for name, found in known.items() if name in later}


def _loss_of_zeros(
    part: Part, pattern: str, sparsity: float, statistics: Mapping[str, LayerStatistics], effect: OutputEffect
) -> float | None:
    """What zeros in all layers of a part do; None where a layer does not take the pattern, or was never reached."""
    chosen = SparsityPattern.parse(pattern)
    changes = []
    for layer in part.layers:
        if layer.name not in statistics:
            return None
        weight = layer.matrix().float().clone()
        try:
            chosen.validate(weight.shape)
        except ValueError:
            return None
        problem = LayerProblem(weight, statistics[layer.name], chosen, None if chosen.sparsity else sparsity)
        changes.append((layer, SparseGPT().solve(problem).weight.to(layer.parameter.dtype)))
    return effect(changes)
