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
from secateur.surgery import remove_
from secateur.timing import MeasurementCache, is_noisy, ratios, time_in_turn

Units = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Probe:
    """The shape of a model.

    Args:
        units: by the name of a dimension, how many of its units go.
        zeros: by the name of a layer, the pattern and the sparsity of its weights.
    """

    units: Mapping[str, int] = field(default_factory=dict)
    zeros: Mapping[str, tuple[str, float]] = field(default_factory=dict)

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
        self, way: str, probes: Sequence[Probe], effect: Callable[[nn.Module], float] | None = None
    ) -> list[Timed]:
        """Return what models of several shapes take in an engine, beside the dense one in PyTorch, in turn.

        What was measured on this machine before is not measured again.

        Args:
            way: that runs them.
            probes: their shapes.
            effect: says what an engine does to the output; asked of the first one only, the dense model.

        Raises:
            Exception: whatever hinders the engine.
        """
        shapes = list(self.timed)
        keys = [f"plan {self.key} {way} {probe.key} {shapes} {self.threads}" for probe in probes]
        found = {number: known for number, key in enumerate(keys) if (known := self.cache.get(key)) is not None}
        if effect is not None and 0 in found and found[0].effect is None:
            del found[0]
        missing = [number for number in range(len(probes)) if number not in found]
        models, nbytes, effects = {}, {}, dict[int, float | None]()
        for number in missing:
            subject = ModuleSubject(self.made(probes[number]), "probe", False, self.batch)
            self._made += 1
            deployed = WAYS[way].make(subject, self.folder / str(self._made))
            models[number] = open_deployed(
                deployed, WAYS[way], with_head=False, threads=self.threads, is_directory=False
            )
            nbytes[number] = deployed.nbytes
            effects[number] = effect(models[number]) if effect is not None and number == 0 else None
        times: dict[int, list[float]] = {number: [] for number in missing}
        noisy = False
        for batch in self.timed.values() if missing else ():
            calls = {-1: partial(call_model, self.model, batch)}
            calls |= {number: partial(call_model, model, batch) for number, model in models.items()}
            with quiet(self.model), torch.no_grad():
                seconds = time_in_turn(calls, -1, keep=tuple(calls), alone=True)
            for number in missing:
                times[number].append(ratios(seconds, -1, number)[1])
                noisy |= is_noisy(seconds[number]) or is_noisy(seconds[-1])
        for number in missing:
            found[number] = Timed(tuple(times[number]), nbytes[number], effects[number], noisy)
            self.cache.put(keys[number], found[number], lasting=not noisy)
        self.cache.save()
        if not all(min(found[number].times) > 0 for number in found):
            raise StatisticsError("a model took no time at all, so that nothing can be compared.")
        return [found[number] for number in range(len(probes))]


def units_gone(graph: Graph, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return how many units of dimensions go, given which fraction of each stays."""
    return {
        name: graph[name].size - kept_count(graph[name], fraction)
        for name, fraction in fractions.items()
        if kept_count(graph[name], fraction) < graph[name].size
    }
