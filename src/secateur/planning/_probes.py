"""Models of another shape, made only to see how long they take: what they compute does not matter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur._errors import StatisticsError
from secateur.calibration import Forward, call_model, quiet
from secateur.comparison import WAYS, ModuleSubject, open_deployed
from secateur.graph import Graph, Removal
from secateur.layers import select_layers
from secateur.patterns import SparsityPattern
from secateur.shrinking import kept_count, lowest
from secateur.surgery import Saved, remove_, zero_
from secateur.timing import MeasurementCache, is_noisy, ratios, time_in_turn

_ROUNDS = 4  # in which models take turns, at least: what they gain is much more than noise


@dataclass(frozen=True)
class Probe:
    """The shape of a model.

    Args:
        units: by the name of a dimension, how many of its units go.
        zeros: by the name of a layer, the pattern and the sparsity of its weights.
    """

    units: Mapping[str, int] = field(default_factory=dict)
    zeros: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """The shape as text."""
        return repr((sorted(self.units.items()), sorted(self.zeros.items())))


@dataclass(frozen=True)
class Timed:
    """What was measured of a model in one engine.

    Args:
        times: how many times as fast as the dense model in PyTorch, at each shape.
        nbytes: of its weights.
        effect: what the engine does to the output of the dense model; None where the model is another one.
        noisy: the machine was busy.
    """

    times: tuple[float, ...]
    nbytes: int
    effect: float | None = None
    noisy: bool = False

    def milliseconds(self, dense: Sequence[float]) -> tuple[float, ...]:
        """Return the time at each shape, given that of the dense model in PyTorch."""
        return tuple(own / times for own, times in zip(dense, self.times, strict=True))

    def to_table(self) -> dict[str, Any]:
        """Return the measurement as a JSON-ready dict."""
        return {"times": list(self.times), "nbytes": self.nbytes, "effect": self.effect}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Timed:
        """Return the measurement that :meth:`to_table` wrote.

        Raises:
            TypeError, ValueError, KeyError: it is not one.
        """
        times = tuple(float(value) for value in table["times"])
        effect = table["effect"]
        if not times or min(times) <= 0 or int(table["nbytes"]) < 0:
            raise ValueError("not a measurement")
        return cls(times, int(table["nbytes"]), None if effect is None else float(effect))


@dataclass(eq=False)
class Bench:
    """Makes models of a shape, deploys them and times them beside the dense one.

    Args:
        model: dense, in PyTorch. It is not changed.
        graph: what can go.
        batch: one input, to follow the model with.
        timed: inputs by their shape.
        forward: how to call the model.
        threads: to compute with.
        cache: of measurements.
        key: of the model, for the cache.
        folder: for what is made.
    """

    model: nn.Module
    graph: Graph
    batch: Any
    timed: Mapping[tuple[int, ...], Any]
    forward: Forward
    threads: int
    cache: MeasurementCache[Timed]
    key: str
    folder: Path
    _milliseconds: tuple[float, ...] = ()
    _made: int = 0

    @property
    def milliseconds(self) -> tuple[float, ...]:
        """Of the dense model in PyTorch, at each shape."""
        if not self._milliseconds:
            found = []
            for batch in self.timed.values():
                with quiet(self.model):
                    calls = {0: partial(call_model, self.model, batch)}
                    found.append(1e3 * median(time_in_turn(calls, 0, alone=True)[0]))
            self._milliseconds = tuple(found)
        return self._milliseconds

    def made(self, probe: Probe) -> nn.Module:
        """Return a model of a shape. Its units and zeros are any."""
        model = copy.deepcopy(self.model)
        removal = {}
        for name, number in probe.units.items():
            dimension = self.graph[name]
            if dimension.kind == "layers":
                free = [unit for unit in range(dimension.size) if unit not in dimension.fixed]
                removal[name] = tuple(free[len(free) - number :])
            else:
                removal[name] = lowest(dimension, np.zeros(dimension.size), number)
        removal = {name: units for name, units in removal.items() if units}
        for name, units in removal.items():
            zero_(model, self.graph[name], units, Saved())  # what is removed must give nothing: it is checked
        if removal:
            remove_(model, self.graph, Removal(removal), self.batch, self.forward)
        if probe.zeros:
            for layer in select_layers(model)[0]:
                if layer.name in probe.zeros:
                    pattern, sparsity = probe.zeros[layer.name]
                    chosen = SparsityPattern.parse(pattern)
                    weight = layer.matrix().clone()
                    mask = chosen.mask(weight.float().square(), None if chosen.sparsity else sparsity)
                    layer.write_(weight * mask)
        return model

    def measure(
        self,
        jobs: Sequence[tuple[str, Probe]],
        effect: Callable[[nn.Module], float] | None = None,
        hinder: dict[str, str] | None = None,
    ) -> dict[tuple[str, Probe], Timed]:
        """Return what models of several shapes take in engines, beside the dense one in PyTorch, all in turn.

        What was measured on this machine before is not measured again.

        Args:
            jobs: ways, each with the shape of a model.
            effect: says what an engine does to the output of the dense model.
            hinder: gets by way what hinders an engine, which is then left out. None: that is raised.
        """
        shapes = list(self.timed)
        keys = {job: f"plan {self.key} {job[0]} {job[1].key} {shapes} {self.threads}" for job in jobs}
        found = {job: known for job, key in keys.items() if (known := self.cache.get(key)) is not None}
        if effect is not None:
            found = {job: known for job, known in found.items() if known.effect is not None}
        models: dict[tuple[str, Probe], nn.Module] = {}
        sizes: dict[tuple[str, Probe], int] = {}
        effects: dict[tuple[str, Probe], float | None] = {}
        subjects: dict[str, ModuleSubject] = {}
        for job in keys:
            if job in found:
                continue
            way, probe = WAYS[job[0]], job[1]
            try:
                if probe.key not in subjects:
                    subjects[probe.key] = ModuleSubject(self.made(probe), "probe", False, self.batch)
                self._made += 1
                deployed = way.make(subjects[probe.key], self.folder / str(self._made))
                model = open_deployed(deployed, way, with_head=False, threads=self.threads, is_directory=False)
                with torch.no_grad():
                    effects[job] = None if effect is None else effect(model)
            except Exception as error:  # of other libraries, too: the report says what hinders an engine
                if hinder is None:
                    raise
                hinder[job[0]] = next(iter(str(error).splitlines()), type(error).__name__)[:300]
                continue
            models[job], sizes[job] = model, deployed.nbytes
        times: dict[tuple[str, Probe], list[float]] = {job: [] for job in models}
        noisy: set[tuple[str, Probe]] = set()
        for batch in self.timed.values() if models else ():
            calls = {job: partial(call_model, model, batch) for job, model in models.items()}
            with quiet(self.model), torch.no_grad():
                seconds = time_in_turn(
                    {None: partial(call_model, self.model, batch), **calls},
                    None,
                    keep=tuple(calls) if effect is None else (),
                    alone=True,
                    fewest=_ROUNDS,
                )
            for job in models:
                times[job].append(ratios(seconds, None, job)[1])
                noisy |= {job} if is_noisy(seconds[job]) or is_noisy(seconds[None]) else set()
        for job in models:
            found[job] = Timed(tuple(times[job]), sizes[job], effects[job], job in noisy)
            self.cache.put(keys[job], found[job], lasting=job not in noisy)
        self.cache.save()
        if not all(min(timed.times) > 0 for timed in found.values()):
            raise StatisticsError("a model took no time at all, so that nothing can be compared.")
        return found


def units_gone(graph: Graph, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return how many units of dimensions go, given which fraction of each stays."""
    return {
        name: graph[name].size - kept_count(graph[name], fraction)
        for name, fraction in fractions.items()
        if kept_count(graph[name], fraction) < graph[name].size
    }
