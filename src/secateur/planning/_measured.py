"""All that is measured of a model before a plan is made, and measured again after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import Forward, Padding
from secateur.graph import Graph
from secateur.layers import select_layers
from secateur.packing import machine
from secateur.planning._costs import WayCosts, measure_costs
from secateur.planning._effects import Effects, few_rows, measure_effects
from secateur.planning._means import Means
from secateur.planning._parts import Part, parts_of
from secateur.planning._probes import Bench, Probe, Timed
from secateur.planning._solutions import Problem, Solution
from secateur.planning._stages import probe_of
from secateur.planning._target import Target
from secateur.pruning import OutputEffect
from secateur.shapes import structure_hash
from secateur.shrinking import analyze
from secateur.timing import MeasurementCache

_WAYS = 2  # engines whose costs are measured part by part: those in which the dense model is fastest
_ROUNDS = 3  # in which measured times correct the predicted ones
_CLOSE = 0.05  # a measured time that differs by no more than this part is as predicted


@dataclass(eq=False)
class Measured:
    """What is known of a model.

    Args:
        model: dense.
        graph: what can go.
        parts: to decide on.
        bench: times models.
        dense: what was measured of the dense model, by way.
        absent: ways that could not be used, with the reason.
        problem: all that a solution follows from.
        rounds: for each round predicted and measured milliseconds.
        seconds: by what they were spent on.
    """

    model: nn.Module
    graph: Graph
    parts: tuple[Part, ...]
    bench: Bench
    dense: dict[str, Timed]
    absent: dict[str, str]
    problem: Problem
    rounds: list[tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def corrected(self, target: Target, progress: Progress) -> tuple[Solution, Timed]:
        """Return the solution for a target after its time was measured, and what was measured.

        A model of the right shape is made and timed. Where it is not as predicted, the costs are corrected and solved
        again, three times at most.

        Raises:
            RecipeError: the target cannot be reached.
        """
        with self.counting("correcting"):
            found: tuple[Solution, Timed] | None = None
            for number in range(_ROUNDS):
                solution = self.problem.solve(target)
                if found is not None and (solution.choices, solution.way) == (found[0].choices, found[0].way):
                    break
                progress("timing the model as it would be", number, _ROUNDS)
                timed = self.correct(solution)
                found = solution, timed
                said, real = self.rounds[-1]
                off = max(abs(own / other - 1) for own, other in zip(real, said, strict=True))
                if off <= _CLOSE and self.reaches(target, timed):
                    break
            assert found is not None
            if not self.reaches(target, found[1]):
                times = ", ".join(f"{value:.2f}" for value in found[1].times)
                raise RecipeError(
                    f"the target {target.text} cannot be reached: the model that was predicted to reach it is {times} "
                    f"times as fast, in {found[1].nbytes / 1e6:.1f} MB, as measured.\nGive at most "
                    f"{min(found[1].times):.1f}x, allow more means, or fewer shapes."
                )
            return found

    def correct(self, solution: Solution) -> Timed:
        """Time a model of the shape of a solution, and correct the costs of its engine by that."""
        probe = probe_of(self.model, self.graph, self.parts, solution)
        timed = self.bench.measure([(solution.way, probe)])[solution.way, probe]
        real = timed.milliseconds(self.bench.milliseconds)
        self.rounds.append((solution.milliseconds, real))
        costs = dict(self.problem.costs)
        costs[solution.way] = costs[solution.way].corrected(solution.milliseconds, real)
        self.problem = replace(self.problem, costs=costs)
        return timed

    def reaches(self, target: Target, timed: Timed) -> bool:
        """Return whether a measured model is as fast and as small as a target says."""
        if target.speedup is not None and min(timed.times) < target.speedup:
            return False
        real = timed.milliseconds(self.bench.milliseconds)
        if target.milliseconds is not None and max(real) > target.milliseconds:
            return False
        return target.nbytes is None or timed.nbytes <= target.nbytes

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """Count the seconds that something takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


def measure_all(
    model: nn.Module,
    batches: Sequence[Any],
    paddings: Sequence[Padding],
    timed: Mapping[tuple[int, ...], Any],
    means: Means,
    *,
    small: tuple[Sequence[Any], Sequence[Padding]],
    forward: Forward,
    threads: int,
    cache: str | Path | None,
    folder: Path,
    uniform: bool,
    progress: Progress,
) -> Measured:
    """Find what can go, and measure what it costs and what it loses.

    Args:
        model: dense. It is not changed.
        batches: to learn from.
        paddings: of each.
        timed: inputs at which time counts, by their shape.
        means: that are allowed.
        small: batches on which outputs are compared, and their paddings.
        forward: how to call the model.
        threads: to compute with.
        cache: file of measurements; None for those of this process.
        folder: for what is made.
        uniform: parts of a kind are only made alike.
        progress: called with a description, and how much of how much is done.

    Raises:
        RecipeError: there is nothing to decide on, or no engine runs the model.
    """
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    progress("looking for what can go", 0, 1)
    graph = analyze(model, [few_rows(batches[0])], forward=forward)
    parts = parts_of(model, graph, select_layers(model)[0])
    seconds["analysis"] = time.perf_counter() - began
    key = structure_hash(model)[:16]
    store = MeasurementCache(cache, machine(), Timed.from_table, Timed.to_table)
    bench = Bench(model, graph, few_rows(batches[0], 2), timed, forward, threads, store, key, folder)
    began = time.perf_counter()
    with torch.no_grad():
        comparison = OutputEffect(model.eval(), small[0], small[1], forward)
    dense: dict[str, Timed] = {"torch": Timed((1.0,) * len(timed), _nbytes(model), 0.0)}
    absent = dict(means.absent)
    progress("timing the dense model in all engines", 0, 1)
    others = [(way, Probe()) for way in means.dense_ways if way != "torch"]
    found = bench.measure(others, comparison.of, absent)
    dense |= {way: timed for (way, _), timed in found.items()}
    if "torch" not in means.ways:
        del dense["torch"]
    if not dense:
        raise RecipeError(f"no engine runs the model: {'; '.join(f'{way}: {why}' for way, why in absent.items())}.")
    seconds["engines"] = time.perf_counter() - began
    began = time.perf_counter()
    best = sorted(dense, key=lambda way: -min(dense[way].times))[:_WAYS]
    costs: dict[str, WayCosts] = {}
    for way in best:
        try:
            costs[way] = measure_costs(bench, parts, means, way, dense[way], progress)
        except Exception as error:
            absent[way] = next(iter(str(error).splitlines()), type(error).__name__)[:300]
    if not costs:
        raise RecipeError(f"the model can be timed in no engine: {'; '.join(absent.values())}.")
    seconds["costs"] = time.perf_counter() - began
    began = time.perf_counter()
    effects = (
        measure_effects(model, graph, parts, means, batches, paddings, small, forward, progress) if parts else Effects()
    )
    seconds["losses"] = time.perf_counter() - began
    size = sum(parameter.numel() for parameter in model.parameters())
    problem = Problem(parts, means, effects, costs, bench.milliseconds, size, uniform)
    return Measured(model, graph, parts, bench, dense, absent, problem, seconds=seconds)


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
