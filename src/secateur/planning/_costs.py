"""Milliseconds and bytes of every part in one engine: measured at a few sizes, with lines between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from secateur._types import Progress
from secateur.planning._means import Choice, Means
from secateur.planning._parts import Part
from secateur.planning._probes import Bench, Probe, Timed, units_gone

_SHORT = 2  # blocks of a list in the models that are timed: two, so that what lies between blocks counts
# Sizes of a dimension that are timed; others lie on the lines through these and the whole. What attention costs is
# nearly proportional to its heads.
_TIMED: Mapping[str, tuple[float, ...]] = {"heads": (0.5,)}
_TIMED_ELSE = (0.5, 0.25)

Cost = NDArray[np.float64]  # milliseconds at each shape, and then bytes


@dataclass(frozen=True)
class WayCosts:
    """What the parts of a model cost in one engine.

    Args:
        way: that runs it.
        dense: of the model as it is.
        whole: by the kind of a part, what one such part costs; zeros for parts that cannot go.
        saved: by the kind of a part, and the place of a dimension in it, the fraction that stays and what that saves.
        zeros: by the kind of a part, the pattern and the sparsity: what zeros save in a part of full size.
        effect: what the engine itself does to the output of the dense model.
        factor: by which measured milliseconds corrected the predicted ones, at each shape.
        noisy: the machine was busy with something else.
    """

    way: str
    dense: Cost
    whole: Mapping[str, Cost]
    saved: Mapping[tuple[str, int], Sequence[tuple[float, Cost]]]
    zeros: Mapping[tuple[str, str, float], Cost]
    effect: float = 0.0
    factor: tuple[float, ...] = ()
    noisy: bool = False

    def fixed(self, parts: Sequence[Part]) -> Cost:
        """Return what is spent outside of all parts."""
        spent: Cost = self.dense - sum((self.whole[part.kind] for part in parts), np.zeros_like(self.dense))
        return self._corrected(spent)

    def of(self, part: Part, choice: Choice) -> Cost:
        """Return what a part costs; negative for one whose whole cost is not known, which only saves."""
        if choice.is_removed:
            return np.zeros_like(self.dense)
        cost, left = self.whole[part.kind].copy(), 1.0
        for place, (found, fraction) in enumerate(zip(part.dimensions, choice.kept, strict=True)):
            cost -= self._saved(part.kind, place, fraction)
            left -= part.shares.get(found.name, 0.0) * (1 - fraction)
        if choice.pattern:
            cost -= max(left, 0.0) * self.zeros.get(
                (part.kind, choice.pattern, choice.sparsity), np.zeros_like(self.dense)
            )
        return self._corrected(cost)

    def _saved(self, kind: str, place: int, fraction: float) -> Cost:
        points = sorted([*self.saved.get((kind, place), ()), (1.0, np.zeros_like(self.dense))], key=lambda one: one[0])
        if len(points) == 1 or fraction >= 1:
            return np.zeros_like(self.dense)
        at = [point[0] for point in points]
        columns = np.stack([point[1] for point in points]).T
        if fraction < at[0]:  # on the line through the two smallest sizes
            rest = (fraction - at[0]) / (at[1] - at[0])
            return np.array([column[0] + rest * (column[1] - column[0]) for column in columns])
        return np.array([np.interp(fraction, at, column) for column in columns])

    def _corrected(self, cost: Cost) -> Cost:
        return cost * np.array([*self.factor, 1.0]) if self.factor else cost

    def corrected(self, predicted: Sequence[float], measured: Sequence[float]) -> WayCosts:
        """Return the costs after a model was measured, in milliseconds at each shape."""
        before = self.factor or (1.0,) * len(predicted)
        now = tuple(
            factor * real / said if said > 0 else factor
            for factor, said, real in zip(before, predicted, measured, strict=True)
        )
        return replace(self, factor=now)


@dataclass(eq=False)
class _Measuring:
    """The probes of one engine: added one by one, and measured together."""

    bench: Bench
    way: str
    probes: list[Probe] = field(default_factory=list)

    def add(self, probe: Probe) -> int:
        if probe not in self.probes:
            self.probes.append(probe)
        return self.probes.index(probe)


def measure_costs(
    bench: Bench,
    parts: Sequence[Part],
    means: Means,
    way: str,
    dense: Timed,
    progress: Progress,
) -> WayCosts:
    """Measure what the parts of a model cost in one engine.

    Models with two blocks of each list are timed, of which all blocks have one size, or zeros; the whole model was
    timed before. What lies outside of the blocks is what they do not explain.

    Args:
        bench: makes and times models.
        parts: to decide on.
        means: that are allowed.
        way: that runs them.
        dense: what was measured of the dense model in it.
        progress: called with a description, and how much of how much is done.
    """
    lists = {part.blocks.name: part.blocks for part in parts if part.blocks is not None}
    short = {name: found.size - max(_SHORT, len(found.fixed)) for name, found in lists.items() if found.size > _SHORT}
    kinds: dict[str, list[Part]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    stay = {name: _first(found.size, found.fixed, short.get(name, 0)) for name, found in lists.items()}
    here = {
        kind: [part for part in members if part.blocks is None or part.unit in stay[part.blocks.name]]
        for kind, members in kinds.items()
    }
    measuring = _Measuring(bench, way)
    base = measuring.add(Probe(short))
    single = {
        name: measuring.add(Probe({**short, name: found.size - max(1, len(found.fixed))}))
        for name, found in lists.items()
        if found.size > 1 and name not in short
    }
    sizes: dict[tuple[str, int, float], int] = {}
    zeros: dict[tuple[str, str, float], int] = {}
    for kind, members in here.items():
        if not members:
            continue
        for place, dimension in enumerate(members[0].dimensions):
            sizes_of = _TIMED.get(dimension.kind, _TIMED_ELSE) if means.fractions(dimension.kind) else ()
            for fraction in sizes_of:
                gone = units_gone(bench.graph, {part.dimensions[place].name: fraction for part in members})
                if gone:
                    sizes[kind, place, fraction] = measuring.add(Probe({**short, **gone}))
        for choice in means.choices(members[0], way):
            if choice.pattern and all(fraction == 1 for fraction in choice.kept):
                masks = {layer.name: (choice.pattern, choice.sparsity) for part in members for layer in part.layers}
                zeros[kind, choice.pattern, choice.sparsity] = measuring.add(Probe(short, masks))
    progress(f"timing parts of the model in {way}", 0, 1)
    measured = bench.measure([(way, probe) for probe in measuring.probes])
    found = [measured[way, probe] for probe in measuring.probes]
    costs = [_cost(bench, timed) for timed in found]
    whole_model = _cost(bench, dense)
    nothing = np.zeros_like(whole_model)
    whole = dict.fromkeys(kinds, nothing)
    for name, blocks in lists.items():
        if name in single:
            each = (costs[base] - costs[single[name]]) / (blocks.size - max(1, len(blocks.fixed)))
        elif name in short and len(short) == 1:
            each = (whole_model - costs[base]) / short[name]
        elif name in short:  # of several lists, one is as it is
            other = way, Probe({key: gone for key, gone in short.items() if key != name})
            each = (_cost(bench, bench.measure([other])[other]) - costs[base]) / short[name]
        else:
            continue
        for part in parts:
            if part.blocks is not None and part.blocks.name == name:
                whole[part.kind] = np.maximum(each, 0.0)
    saved: dict[tuple[str, int], list[tuple[float, Cost]]] = {}
    for (kind, place, fraction), number in sizes.items():
        saved.setdefault((kind, place), []).append((fraction, (costs[base] - costs[number]) / len(here[kind])))
    known = {key: (costs[base] - costs[number]) / len(here[key[0]]) for key, number in zeros.items()}
    return WayCosts(
        way, whole_model, whole, saved, known, dense.effect or 0.0, noisy=any(timed.noisy for timed in found)
    )


def _cost(bench: Bench, timed: Timed) -> Cost:
    return np.array([*timed.milliseconds(bench.milliseconds), float(timed.nbytes)])


def _first(size: int, fixed: Sequence[int], gone: int) -> set[int]:
    """The numbers of the blocks that stay when the last ones go."""
    free = [unit for unit in range(size) if unit not in fixed]
    return set(range(size)) - set(free[len(free) - gone :] if gone else ())
