"""The choice with the least loss that reaches a target, from what was measured. No model is run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from secateur._errors import RecipeError
from secateur.planning._costs import WayCosts
from secateur.planning._effects import Depth, Effects
from secateur.planning._means import Choice, Means
from secateur.planning._parts import Part
from secateur.planning._target import Target
from secateur.pruning import Option, choose, choose_many

_TOTALS = 1 << 16  # totals of costs that are told apart, over all budgets: a hundredth of a percent for one of them
_UNIFORM = 1.02  # a model in which all parts are alike may lose this many times as much, and is taken
_SPEEDS = 16  # of the frontier
_FLOOR = 0.01  # of the dense model's time in PyTorch, which no prediction is below
_MOST_UNIFORM = 4096  # choices of one size for all parts that are looked at


@dataclass(frozen=True)
class Solution:
    """One choice for every part.

    Args:
        way: that runs the model.
        depth: blocks that go.
        choices: for each part, in the order of the parts.
        milliseconds: at each shape, as predicted.
        times: how many times as fast as the dense model in PyTorch, as predicted.
        nbytes: of the weights, as predicted.
        parameters: of the model, as predicted.
        loss: what it does to the output, as predicted: all losses added up.
        is_uniform: all parts that stay are alike.
    """

    way: str
    depth: Depth
    choices: tuple[Choice, ...]
    milliseconds: tuple[float, ...]
    times: tuple[float, ...]
    nbytes: int
    parameters: int
    loss: float
    is_uniform: bool = False

    @property
    def speedup(self) -> float:
        """At the shape where it is least."""
        return min(self.times)


@dataclass(frozen=True, eq=False)
class Problem:
    """All that was measured of a model.

    Args:
        parts: to decide on.
        means: that are allowed.
        effects: losses.
        costs: of each engine, by its way.
        dense: milliseconds of the dense model in PyTorch, at each shape.
        parameters: of the dense model.
        uniform: parts of a kind are only made alike.
    """

    parts: tuple[Part, ...]
    means: Means
    effects: Effects
    costs: Mapping[str, WayCosts]
    dense: tuple[float, ...]
    parameters: int
    uniform: bool = False

    def solve(self, target: Target) -> Solution:
        """Return the choice with the least predicted loss that reaches a target.

        Raises:
            RecipeError: none reaches it, with the best that there is.
        """
        found = list(self.solutions(target))
        if not found:
            raise RecipeError(self._refusal(target))
        return min(found, key=lambda one: (one.loss, sum(one.milliseconds)))

    def solutions(self, target: Target) -> Iterator[Solution]:
        """Yield for each engine and each number of blocks the choice with the least loss that reaches a target."""
        for way in self.costs:
            for depth in self.effects.depths:
                found = self._at(way, depth, target)
                if found is not None:
                    yield found

    def frontier(self, target: Target) -> list[Solution]:
        """Return the least predicted loss by speed, from slow to fast. Each is faster and loses more than the last.

        Args:
            target: of which all but the speed is kept to.
        """
        fastest = self.fastest(target)
        top = fastest.speedup if fastest is not None else 1.0
        speeds = np.geomspace(1.0, max(top * 0.999, 1.0), _SPEEDS)
        if target.speedup is not None and target.speedup <= top:
            speeds = np.sort([*speeds, target.speedup])
        found: list[Solution] = []
        for speed in speeds:
            found += self.solutions(replace(target, speedup=float(speed), milliseconds=None))
        kept: list[Solution] = []
        for one in sorted(found, key=lambda one: (-one.speedup, one.loss)):
            if not kept or one.loss < kept[-1].loss - 1e-12:
                kept.append(one)
        return kept[::-1]

    def fastest(self, target: Target) -> Solution | None:
        """Return the fastest model that there is, whatever it loses, within all of a target but its speed."""
        best: Solution | None = None
        for way in self.costs:
            for depth in self.effects.depths:
                low, high = 0.5, 1000.0
                found = self._at(way, depth, replace(target, speedup=low, milliseconds=None))
                if found is None:
                    continue
                while high / low > 1.02:
                    middle = math.sqrt(low * high)
                    tried = self._at(way, depth, replace(target, speedup=middle, milliseconds=None))
                    low, high, found = (low, middle, found) if tried is None else (middle, high, tried)
                if best is None or found.speedup > best.speedup:
                    best = found
        return best

    def _refusal(self, target: Target) -> str:
        best = self.fastest(replace(target, milliseconds=None))
        if best is None:
            alone = self.fastest(Target())
            assert alone is not None
            return (
                f"the target {target.text} cannot be reached by what is allowed, whatever the speed.\nThe smallest "
                f"known has {self._smallest()}. Allow more means, or another target."
            )
        times = ", ".join(f"{value:.2f}" for value in best.times)
        return (
            f"the target {target.text} cannot be reached: the fastest model that is allowed is predicted to be {times} "
            f"times as fast, in {best.milliseconds[0]:.3g} ms at the first shape, by way of {best.way}.\nGive at most "
            f"{best.speedup:.1f}x, allow more means, or fewer shapes."
        )

    def _smallest(self) -> str:
        sizes = []
        for way in self.costs:
            for depth in self.effects.depths:
                options = self._options(way, depth)
                least = [min(row, key=lambda one: one[1][-2]) for row in options]
                made = self._made(way, depth, [choice for choice, *_ in least])
                sizes.append((made.nbytes, made.parameters))
        nbytes, parameters = min(sizes)
        return f"{nbytes / 1e6:.1f} MB and {parameters / self.parameters:.2f} of the parameters"

    def _at(self, way: str, depth: Depth, target: Target) -> Solution | None:
        """The best choice in one engine without some blocks; None if none reaches the target."""
        limits = self._limits(target)
        alike = self._alike(way, depth, limits)
        if self.uniform:
            return alike
        free = self._free(way, depth, limits)
        if free is None or alike is None:
            return free or alike
        return alike if alike.loss <= _UNIFORM * free.loss else free

    def _limits(self, target: Target) -> NDArray[np.float64]:
        """The most that may be spent: milliseconds at each shape, bytes, parameters. Infinite for no limit."""
        spent = np.full(len(self.dense) + 2, np.inf)
        if target.speedup is not None:
            spent[:-2] = np.array(self.dense) / target.speedup
        if target.milliseconds is not None:
            spent[:-2] = np.minimum(spent[:-2], target.milliseconds)
        if target.nbytes is not None:
            spent[-2] = target.nbytes
        if target.parameters is not None:
            spent[-1] = target.parameters * self.parameters
        return spent

    def _options(self, way: str, depth: Depth) -> list[list[tuple[Choice, NDArray[np.float64], float]]]:
        """For each part its choices, with what they cost (as in :meth:`_limits`) and lose."""
        costs, rows = self.costs[way], []
        for part in self.parts:
            if self._is_gone(part, depth):
                gone = Choice(is_removed=True)
                rows.append([(gone, np.append(costs.of(part, gone), 0.0), 0.0)])
                continue
            row = []
            for choice in self.means.choices(part, way):
                spent = np.append(costs.of(part, choice), self._parameters_of(part, choice))
                row.append((choice, spent, self.effects.of(part, choice)))
            rows.append(row)
        return rows

    @staticmethod
    def _is_gone(part: Part, depth: Depth) -> bool:
        return part.blocks is not None and part.unit in depth.gone.get(part.blocks.name, ())

    @staticmethod
    def _parameters_of(part: Part, choice: Choice) -> float:
        shares = (
            part.shares.get(found.name, 0.0) * (1 - fraction)
            for found, fraction in zip(part.dimensions, choice.kept, strict=True)
        )
        return part.parameters * max(0.0, 1 - sum(shares))

    def _fixed(self, way: str) -> NDArray[np.float64]:
        rest = self.parameters - sum(part.parameters for part in self.parts)
        return np.append(self.costs[way].fixed(self.parts), max(rest, 0))

    def _made(self, way: str, depth: Depth, choices: Sequence[Choice], is_uniform: bool = False) -> Solution:
        """A solution with all that is predicted of it."""
        spent, lost = self._fixed(way), self.costs[way].effect + depth.loss
        for part, choice in zip(self.parts, choices, strict=True):
            spent = spent + np.append(
                self.costs[way].of(part, choice), 0.0 if choice.is_removed else self._parameters_of(part, choice)
            )
            lost += 0.0 if choice.is_removed else self.effects.of(part, choice)
        # What parts save adds up to more than there is where they share weights: nothing takes no time.
        milliseconds = tuple(max(float(value), _FLOOR * dense) for value, dense in zip(spent, self.dense, strict=False))
        times = tuple(dense / max(own, 1e-9) for dense, own in zip(self.dense, milliseconds, strict=True))
        return Solution(
            way, depth, tuple(choices), milliseconds, times, round(spent[-2]), round(spent[-1]), lost, is_uniform
        )

    def _free(self, way: str, depth: Depth, limits: NDArray[np.float64]) -> Solution | None:
        """The best choice, each part on its own: exact but for the rounding of costs, which is upwards."""
        rows, room = self._options(way, depth), limits - self._fixed(way)
        bound = [axis for axis in range(len(room)) if np.isfinite(room[axis])]
        least = [np.min([spent for _, spent, _ in row], axis=0) for row in rows]
        room = room - sum(least, np.zeros_like(room))
        if any(room[axis] < 0 for axis in bound):
            return None
        if not bound:
            return self._made(way, depth, [min(row, key=lambda one: one[2])[0] for row in rows])
        picked = self._within(rows, least, room, bound)
        if picked is None:
            return None
        return self._made(way, depth, [row[number][0] for row, number in zip(rows, picked, strict=True)])

    @staticmethod
    def _within(
        rows: Sequence[Sequence[tuple[Choice, NDArray[np.float64], float]]],
        least: Sequence[NDArray[np.float64]],
        room: NDArray[np.float64],
        axes: Sequence[int],
    ) -> tuple[int, ...] | None:
        if len(axes) > 2:
            many = [
                [(tuple(spent[axis] - low[axis] for axis in axes), lost) for _, spent, lost in row]
                for row, low in zip(rows, least, strict=True)
            ]
            return choose_many(many, [room[axis] for axis in axes])
        totals = round(_TOTALS ** (1 / len(axes)))
        units = [max(room[axis], 1e-9) / totals for axis in axes]
        layers = []
        for row, low in zip(rows, least, strict=True):
            options = []
            for _, spent, lost in row:
                whole = (
                    math.ceil((spent[axis] - low[axis]) / unit - 1e-9) for axis, unit in zip(axes, units, strict=True)
                )
                options.append(Option(tuple(min(max(value, 0), totals + 1) for value in whole), lost))
            layers.append(options)
        try:
            return choose(layers, [totals] * len(axes)).picked
        except RecipeError:
            return None

    def _alike(self, way: str, depth: Depth, limits: NDArray[np.float64]) -> Solution | None:
        """The best choice in which all parts of a kind are alike; None if none reaches the limits."""
        kinds: dict[str, Part] = {}
        for part in self.parts:
            if not self._is_gone(part, depth):
                kinds.setdefault(part.kind, part)
        choices = [self.means.choices(part, way) for part in kinds.values()]
        if math.prod(map(len, choices)) > _MOST_UNIFORM:
            return None
        best: Solution | None = None
        for picked in product(*choices):
            by_kind = dict(zip(kinds, picked, strict=True))
            row = [Choice(True) if self._is_gone(part, depth) else by_kind[part.kind] for part in self.parts]
            made = self._made(way, depth, row, is_uniform=True)
            spent = np.array([*made.milliseconds, made.nbytes, made.parameters])
            if (spent <= limits + 1e-9).all() and (best is None or made.loss < best.loss):
                best = made
        return best
