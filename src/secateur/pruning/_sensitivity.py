"""How much does a layer's error grow with its sparsity, how much does the output suffer, and what share is best?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from secateur._errors import naming
from secateur._types import Scores, Weight
from secateur.calibration import LayerStatistics, Need
from secateur.layers import Layer
from secateur.patterns import SparsityPattern, Unstructured, units_to_prune
from secateur.pruning._counts import Shares, meet
from secateur.pruning._figures import squared_error
from secateur.pruning._solve import Option, choose
from secateur.solvers import LayerProblem, Select, Solver, SparseGPT, head_of

Effect = Callable[[Sequence[tuple[Layer, Weight]]], float]

_SPARSITIES = (0.3, 0.5, 0.7, 0.85, 0.95)  # at which the error is computed
_LEVELS = 64  # a layer's sparsity is chosen among its multiples of 1/64
_BUCKETS = 1 << 14  # weights of the whole model are counted in so many parts, at least
_GATHERED: frozenset[Need] = frozenset({"input_norm", "input_mean", "gram"})


@dataclass(frozen=True)
class Curve:
    """The error of a layer's output at some sparsities.

    Args:
        sparsities: ascending, above 0 and below 1.
        errors: squared error of the output at each, a sum over all tokens.
        output: squared output of the dense layer, the error at sparsity 1.
    """

    sparsities: tuple[float, ...]
    errors: tuple[float, ...]
    output: float

    def at(self, sparsity: float) -> float:
        """Return the squared error at a sparsity: powers of the sparsity between two points.

        Below the first point the error grows with its third power, as where the smallest of evenly spread weights go.
        """
        if sparsity <= 0 or self.output <= 0:
            return 0.0
        points = [*zip(self.sparsities, self.errors, strict=True), (1.0, max(self.output, *self.errors, 0.0))]
        points = [point for point in points if point[1] > 0]
        first = points[0]
        if sparsity <= first[0]:
            return first[1] * (sparsity / first[0]) ** 3
        logs = np.log(points)
        return float(np.exp(np.interp(math.log(sparsity), logs[:, 0], logs[:, 1])))


@dataclass(frozen=True)
class Sensitivity:
    """What a layer's sparsity does to the model.

    Args:
        curve: of the layer's own error.
        weight: what a unit of squared error does to the output of the model.
    """

    curve: Curve
    weight: float

    def loss(self, sparsity: float) -> float:
        """Return how far the output of the model moves."""
        return self.weight * self.curve.at(sparsity)

    def relative_error(self, sparsity: float) -> float | None:
        """Return the relative error of the layer's output; None for an output that is zero."""
        return (self.curve.at(sparsity) / self.curve.output) ** 0.5 if self.curve.output > 0 else None


def curve_needs(method: Solver) -> frozenset[Need]:
    """Return the statistics from which the error curves of a method are computed."""
    return proxy(method).needs | {"gram"}


def proxy(method: Solver) -> Solver:
    """Return what stands for a method in error curves.

    A method that only selects is taken as it is. All others move the kept weights as well, and SparseGPT does so in one
    sweep: how its error grows with the sparsity is close to how theirs does.
    """
    return method if isinstance(method, Select) and method.needs <= _GATHERED else SparseGPT()


def method_scores(layer: Layer, statistics: LayerStatistics | None, method: Solver) -> Scores:
    """Return the scores that a method gives the weights of a dense layer, ``[out, in]``.

    They are those of the solver inside all wrappers, at sparsity 0.
    """
    problem = LayerProblem(_wide(layer), statistics, Unstructured("layer"), 0.0)
    with naming(layer.title):
        return head_of(method).solve(problem).scores


def sensitivities(
    layers: Sequence[tuple[Layer, SparsityPattern, LayerStatistics | None]],
    method: Solver,
    sparsity: float,
    effect: Effect,
) -> list[Sensitivity]:
    """Measure the error curve of each layer, and what its error does to the output of the model.

    Each layer is pruned alone, to the sparsity given, and the model is run. The matrices of a stack, such as experts,
    are pruned together, because there may be hundreds: what they do to the output is shared out by their errors.

    Args:
        layers: with the pattern and the statistics of each.
        method: that will prune.
        sparsity: at which the model is run, and around which it will be shared out.
        effect: returns how far the output moves when some weights are changed.
    """
    stand_in = proxy(method)
    curves, solved, errors = [], [], []
    for layer, pattern, statistics in layers:
        with naming(layer.title):
            problem = LayerProblem(_wide(layer), statistics, pattern, sparsity if pattern.sparsity is None else None)
            curve, weight, error = _curve(stand_in, problem)
        curves.append(curve)
        solved.append(weight)
        errors.append(error)
    groups: dict[int, list[int]] = {}
    for number, (layer, _, _) in enumerate(layers):
        key = id(layer.parameter) if isinstance(layer.kind.part, int) else -1 - number
        groups.setdefault(key, []).append(number)
    weights = [0.0] * len(layers)
    for members in groups.values():
        total = sum(errors[number] for number in members)
        if total > 0:
            moved = effect([(layers[number][0], solved[number]) for number in members])
            for number in members:
                weights[number] = moved / total
    return [Sensitivity(curve, weight) for curve, weight in zip(curves, weights, strict=True)]


def _curve(method: Solver, problem: LayerProblem) -> tuple[Curve, Weight, float]:
    """The error curve of a layer; and its weight and its error at the problem's own sparsity."""
    dense = problem.weight
    output = squared_error(dense, torch.zeros_like(dense), problem.statistics)
    solved = method.solve(problem).weight
    error = squared_error(dense, solved, problem.statistics)
    if problem.pattern.sparsity is not None:  # it has no other point
        return Curve((problem.pattern.sparsity,), (error,), output), solved, error
    units = problem.pattern.units(dense.shape).count
    asked = problem.pattern.resolve(problem.sparsity)
    found = {units_to_prune(units, asked): error}
    for sparsity in _SPARSITIES:
        count = units_to_prune(units, sparsity)
        if 0 < count < units and count not in found:
            part = LayerProblem(dense, problem.statistics, problem.pattern, count / units)
            found[count] = squared_error(dense, method.solve(part).weight, problem.statistics)
    counts = sorted(count for count in found if 0 < count < units)
    rising = np.maximum.accumulate([found[count] for count in counts]) if counts else ()
    return Curve(tuple(count / units for count in counts), tuple(float(e) for e in rising), output), solved, error


def least_loss(
    layers: Sequence[Sensitivity], sizes: Sequence[int], budget: float, bounds: tuple[float, float]
) -> Shares:
    """Return the shares with the least sum of losses: exactly, among multiples of 1/64.

    What is left of the budget, less than a 64th of a layer, is spread over all layers.

    Args:
        layers: what was measured.
        sizes: weights of each layer.
        budget: weights to prune.
        bounds: of every share.
    """
    low, high = bounds
    levels = sorted({low, high, *(number / _LEVELS for number in range(_LEVELS + 1) if low < number / _LEVELS < high)})
    unit = max(1, sum(sizes) // _BUCKETS)
    options = [
        [Option((round(size * (1 - level) / unit),), layer.loss(level)) for level in levels]
        for layer, size in zip(layers, sizes, strict=True)
    ]
    kept = max(int((sum(sizes) - budget) / unit), sum(min(option.costs[0] for option in row) for row in options))
    picked = choose(options, [kept]).picked
    shares = np.array([levels[number] for number in picked])
    return meet(lambda number: shares + number, sizes, budget, bounds)


def _wide(layer: Layer) -> Weight:
    weight = layer.matrix()
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
