"""Share out the zeros of a model among its layers: one sparsity for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from secateur._errors import RecipeError, naming
from secateur._types import Weight
from secateur.calibration import LayerStatistics, Need
from secateur.layers import Layer
from secateur.patterns import SparsityPattern, check_sparsity
from secateur.pruning._counts import Shares, Steps, whole_steps
from secateur.pruning._formulas import (
    alpha_shares,
    erk_shares,
    hill_exponent,
    lamp_costs,
    outliers,
    owl_shares,
    saliency_costs,
    threshold_shares,
)
from secateur.pruning._sensitivity import Sensitivity, curve_needs, least_loss, method_scores, sensitivities
from secateur.pruning._solve import Option, choose
from secateur.reports import block_of
from secateur.solvers import Solver, Wanda, head_of


@dataclass(frozen=True)
class Candidate:
    """A layer that gets a share.

    Args:
        layer: to prune.
        pattern: the recipe's, as it applies to this layer, with the method's own scope.
        statistics: of the layer in the dense model, while it is measured.
        measured: what the allocation's ``measure`` returned for it.
    """

    layer: Layer
    pattern: SparsityPattern
    statistics: LayerStatistics | None = None
    measured: Any = None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.layer.matrix().shape
        return rows, columns

    @property
    def weights(self) -> int:
        """Weights that the pattern may prune at all: not those of a remainder that stays dense."""
        return Steps.of(self.pattern, self.shape).total

    def num_pruned(self, sparsity: float | None) -> int:
        """Return how many weights of the layer are pruned at a sparsity."""
        return self.pattern.num_pruned(self.shape, sparsity)


@dataclass(frozen=True)
class Target:
    """What is to be shared out.

    Args:
        sparsity: of all layers together.
        bounds: of the sparsity of each.
        method: that will prune.
        effect: given weights ``[out, in]`` by their layers, returns how far the model's output moves when only they are
            changed. None where there are no inputs.
    """

    sparsity: float
    bounds: tuple[float, float]
    method: Solver
    effect: Callable[[Sequence[tuple[Layer, Weight]]], float] | None = None


@dataclass(frozen=True)
class Allocation:
    """A way to share out zeros.

    Args:
        shares: from the layers and the target to the sparsity of each layer, in their order. The total is the target's
            up to rounding; :func:`allocate` rounds it to whole units that keep the budget exactly.
        measure: called once for all layers of a block, with their statistics, which are gone afterwards; returns what
            ``shares`` needs to know of each. None if it needs to know nothing.
        needs: the statistics of the dense model that ``measure`` reads.
        needs_of: as ``needs``, where the method decides it.
        losses: what a pattern that fixes its own sparsity does to the model in each layer, in any unit. None derives it
            from the shares: a layer with a large share suffers little.
        needs_output: whether ``measure`` runs the model.
        highest: the highest sparsity of a layer at a sparsity of the whole, where the recipe bounds none from above.
    """

    shares: Callable[[Sequence[Candidate], Target], Sequence[float] | Shares]
    measure: Callable[[Sequence[Candidate], Target], Sequence[Any]] | None = None
    needs: frozenset[Need] = frozenset()
    needs_of: Callable[[Solver], frozenset[Need]] = field(default=lambda method: frozenset())
    losses: Callable[[Sequence[Candidate], Target], Sequence[float]] | None = None
    needs_output: bool = False
    highest: Callable[[float], float] = field(default=lambda sparsity: 1.0)


@dataclass(frozen=True)
class Allotted:
    """What each layer gets.

    Args:
        shares: sparsity by the layer's name.
        pruned: weights that this prunes, by the layer's name.
        budget: weights that the target stands for.
        notes: what a reader should know, such as a budget that whole layers do not meet exactly.
    """

    shares: Mapping[str, float]
    pruned: Mapping[str, int]
    budget: int
    notes: tuple[str, ...] = ()


def allocate(layers: Sequence[Candidate], allocation: str, target: Target) -> Allotted:
    r"""Return the sparsity of each layer.

    With :math:`p_l(s)` the number of weights that layer l's pattern prunes at sparsity s
    (:meth:`SparsityPattern.num_pruned`), every allocation keeps the budget

    .. math:: \sum_l p_l(s_l) = \sum_l p_l(s),

    where s is the sparsity of the whole and :math:`s_l` the result. The equation is checked in whole weights.

    A pattern that fixes its own sparsity leaves a layer one choice: the pattern, or nothing. Then the budget is
    :math:`\sum_l s n_l`, with the weights :math:`n_l` that the pattern covers, and those layers are pruned whose total
    is nearest to it, and among such choices those that lose least. Where the sizes have no large common divisor, totals
    are told apart in parts of 1/131,072 of all weights.

    Args:
        layers: the layers to prune, with what was measured of them.
        allocation: its name in the table.
        target: what is to be shared out.

    Raises:
        PatternError: a share that is outside [0, 1].
        RecipeError: the allocation does not keep the budget.
    """
    if fixed := layers[0].pattern.sparsity:
        return _whole_layers(layers, allocation, target, fixed)
    start = [candidate.num_pruned(target.sparsity) for candidate in layers]
    steps = [Steps.of(candidate.pattern, candidate.shape, target.bounds) for candidate in layers]
    names = [candidate.layer.name for candidate in layers]
    if is_settled(allocation, target):
        return Allotted(dict.fromkeys(names, target.sparsity), dict(zip(names, start, strict=True)), sum(start))
    shares = [float(share) for share in ALLOCATIONS[allocation].shares(layers, target)]
    for candidate, share in zip(layers, shares, strict=True):
        with naming(candidate.layer.title):
            check_sparsity(share, f"the share that {allocation!r} gives it")
    wanted = sum(share * step.total for share, step in zip(shares, steps, strict=True))
    if abs(wanted - sum(start)) > sum(step.weights for step in steps):
        raise RecipeError(
            f"the allocation {allocation!r} prunes {round(wanted)} weights, but the budget is {sum(start)}.\n"
            "Its shares, each times the weights of its layer, must add up to that of the target, up to rounding."
        )
    units = [count // max(step.weights, 1) for count, step in zip(start, steps, strict=True)]
    found = whole_steps(shares, steps, units)
    result = {name: count / max(step.number, 1) for name, count, step in zip(names, found, steps, strict=True)}
    pruned = {candidate.layer.name: candidate.num_pruned(result[candidate.layer.name]) for candidate in layers}
    if sum(pruned.values()) != sum(start):
        raise RecipeError(
            f"the allocation {allocation!r} prunes {sum(pruned.values())} weights, but the budget is {sum(start)}."
        )
    return Allotted(result, pruned, sum(start))


def is_settled(allocation: str, target: Target) -> bool:
    """Return whether every layer gets the target's sparsity, so that there is nothing to measure."""
    return allocation == "uniform" or target.sparsity in (0, 1) or target.bounds[0] == target.bounds[1]


def bounds_of(allocation: str, sparsity: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of each sparsity: those of a recipe, or the allocation's own where it has none above."""
    low, high = bounds
    return low, high if high < 1 else max(low, ALLOCATIONS[allocation].highest(sparsity))


def needs_of(allocation: str, method: Solver) -> frozenset[Need]:
    """Return the statistics of the dense model that an allocation reads when a method prunes."""
    found = ALLOCATIONS[allocation]
    return found.needs | found.needs_of(method)


_MOST_TOTALS = 1 << 17  # of whole layers, that are told apart


def _whole_layers(layers: Sequence[Candidate], allocation: str, target: Target, fixed: float) -> Allotted:
    """Which layers get a pattern that fixes its own sparsity; the others stay dense."""
    most = [candidate.num_pruned(None) for candidate in layers]
    budget = round(sum(most) * min(target.sparsity / fixed, 1.0))
    names = [candidate.layer.name for candidate in layers]
    if allocation == "uniform" or budget == sum(most):
        return Allotted(dict.fromkeys(names, fixed), dict(zip(names, most, strict=True)), sum(most))
    found = ALLOCATIONS[allocation]
    if budget == 0:
        losses: Sequence[float] = [1.0] * len(layers)
    elif found.losses is not None:
        losses = found.losses(layers, target)
    else:
        shares = np.clip(np.asarray(found.shares(layers, target), np.float64), 0, 1)
        losses = [float(count * (1 - share)) for count, share in zip(most, shares, strict=True)]
    unit = max(1, -(-sum(most) // _MOST_TOTALS)) if np.gcd.reduce(most) * _MOST_TOTALS < sum(most) else 1
    options = [
        [Option((0,), 0.0), Option((round(count / unit),), loss)] for count, loss in zip(most, losses, strict=True)
    ]
    picked = choose(options, [round(budget / unit)], within="nearest").picked
    pruned = {name: count * pick for name, count, pick in zip(names, most, picked, strict=True)}
    total = sum(pruned.values())
    whole = sum(candidate.weights for candidate in layers)
    note = (
        f"{sum(picked)} of {len(layers)} layers get {layers[0].pattern} and the others stay dense: {total:,} weights "
        f"({total / whole:.2%}) are pruned, and the budget of {target.sparsity:.2%} is {budget:,}"
    )
    return Allotted({name: fixed * pick for name, pick in zip(names, picked, strict=True)}, pruned, budget, (note,))


# The table


def _uniform(layers: Sequence[Candidate], target: Target) -> Sequence[float]:
    """Every layer gets the recipe's sparsity: the budget equation holds layer by layer."""
    return [target.sparsity] * len(layers)


def _budget(layers: Sequence[Candidate], target: Target) -> tuple[list[int], float, tuple[float, float]]:
    """Weights of each layer, weights to prune, and the bounds, which say nothing where a layer is pruned or not."""
    sizes = [candidate.weights for candidate in layers]
    if layers[0].pattern.sparsity is not None:
        return sizes, target.sparsity * sum(sizes), (0.0, 1.0)
    return sizes, float(sum(candidate.num_pruned(target.sparsity) for candidate in layers)), target.bounds


def _sides(layer: Layer) -> tuple[int, ...]:
    """Sizes of a weight's dimensions, those of a kernel among them."""
    rows, columns = layer.matrix().shape
    width = layer.channel_width
    kernel = tuple(layer.parameter.shape[2:]) if width > 1 and not layer.is_part else (width,)
    return (rows, columns // width, *(side for side in kernel if side > 1))


def _erk(layers: Sequence[Candidate], target: Target) -> Shares:
    return erk_shares([_sides(candidate.layer) for candidate in layers], *_budget(layers, target))


def _threshold(layers: Sequence[Candidate], target: Target) -> Shares:
    return threshold_shares([candidate.measured for candidate in layers], *_budget(layers, target))


def _saliencies(layers: Sequence[Candidate], target: Target) -> list[Any]:
    return [saliency_costs(one.pattern, method_scores(one.layer, one.statistics, target.method)) for one in layers]


def _magnitudes(layers: Sequence[Candidate], target: Target) -> list[Any]:
    return [lamp_costs(candidate.pattern, candidate.layer.matrix()) for candidate in layers]


def _outlying(layers: Sequence[Candidate], target: Target) -> list[float]:
    """By block, so that all layers of a block have the same part."""
    blocks = [block_of(one.layer.name) or one.layer.name for one in layers]
    found = {}
    for block in dict.fromkeys(blocks):
        members = [one for one, name in zip(layers, blocks, strict=True) if name == block]
        found[block] = outliers([Wanda().scores(one.layer.matrix(), one.statistics) for one in members])
    return [found[block] for block in blocks]


def _owl(layers: Sequence[Candidate], target: Target) -> Shares:
    return owl_shares([candidate.measured for candidate in layers], *_budget(layers, target))


def _exponents(layers: Sequence[Candidate], target: Target) -> list[float | None]:
    return [hill_exponent(candidate.layer.matrix()) for candidate in layers]


def _alpha(layers: Sequence[Candidate], target: Target) -> Shares:
    exponents = [candidate.measured for candidate in layers]
    return alpha_shares(exponents, [block_of(one.layer.name) for one in layers], *_budget(layers, target))


def _sensitivity(layers: Sequence[Candidate], target: Target) -> Shares:
    sizes, budget, bounds = _budget(layers, target)
    return least_loss([candidate.measured for candidate in layers], sizes, budget, bounds)


def _sensitivities(layers: Sequence[Candidate], target: Target) -> list[Sensitivity]:
    assert target.effect is not None
    problems = [(one.layer, one.pattern, one.statistics) for one in layers]
    return sensitivities(problems, target.method, target.sparsity, target.effect)


_LEFT = 0.25  # of what uniform sparsity leaves, that every layer keeps


def _three_quarters(sparsity: float) -> float:
    """A measured loss says little about a layer that is all but gone, and on other inputs it may matter."""
    return 1 - _LEFT * (1 - sparsity)


def _losses(layers: Sequence[Candidate], target: Target) -> list[float]:
    return [candidate.measured.loss(candidate.pattern.sparsity) for candidate in layers]


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(_uniform),
    "global": Allocation(_threshold, _saliencies, needs_of=lambda method: head_of(method).needs),
    "erk": Allocation(_erk),
    "lamp": Allocation(_threshold, _magnitudes),
    "owl": Allocation(_owl, _outlying, needs=frozenset({"input_norm"})),
    "alpha": Allocation(_alpha, _exponents),
    "sensitivity": Allocation(
        _sensitivity,
        _sensitivities,
        needs_of=curve_needs,
        losses=_losses,
        needs_output=True,
        highest=_three_quarters,
    ),
}
