"""Measure every route of a layer against the dense layer, as it would run in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import kernels
from secateur._types import Weight, dtype_name
from secateur.formats import Format, stored_share
from secateur.kernels import DenseRoute, PrepackedRoute, Route, RoutePlan
from secateur.patterns import SparsityPattern
from secateur.timing import MeasurementCache, Timer, describe_machine, is_noisy, time_in_turn

DENSE, PREPACKED = DenseRoute(), PrepackedRoute()
_EVICTED = 32 << 20  # bytes read between calls where a layer finds its weight in no cache

Seconds = dict[int, dict[Route, list[float]]]  # rows -> route -> seconds in each round; dropped routes have fewer


@dataclass(frozen=True)
class Measurement:
    """What was measured of layers that run alike.

    Args:
        seconds: by rows and route, one number for each round; rounds of different routes with the same index ran in
            turn. ``DenseRoute()`` is the dense layer itself.
        nbytes: of memory that each route needs besides the stored weight.
    """

    seconds: Seconds
    nbytes: dict[Route, int]

    @property
    def noisy(self) -> bool:
        """Whether the machine was busy with something else."""
        return any(len(routes[DENSE]) > 1 and is_noisy(routes[DENSE]) for routes in self.seconds.values())

    def to_table(self) -> dict[str, Any]:
        """Return the measurement as JSON holds it, routes as text."""
        return {
            "seconds": {
                str(rows): {str(route): times for route, times in routes.items()}
                for rows, routes in self.seconds.items()
            },
            "nbytes": {str(route): nbytes for route, nbytes in self.nbytes.items()},
        }

    @classmethod
    def from_table(cls, table: Any) -> Measurement:
        """Return the measurement that :meth:`to_table` wrote, in any version.

        Raises:
            ValueError: it cannot be one; or ``TypeError``, ``KeyError``, ``AttributeError``, ``OverflowError``.
        """
        seconds = {
            int(rows): {_route(text): [float(s) for s in times] for text, times in routes.items()}
            for rows, routes in table["seconds"].items()
        }
        nbytes = {_route(text): int(n) for text, n in table["nbytes"].items()}
        if not seconds or min(seconds) < 1 or DENSE not in nbytes or any(n < 0 for n in nbytes.values()):
            raise ValueError("rows, bytes or the dense layer's times are not what they should be")
        for routes in seconds.values():
            if routes.keys() != nbytes.keys() or not all(routes.values()):
                raise ValueError("some routes lack times or bytes")
            if not all(0 < s < math.inf for times in routes.values() for s in times):
                raise ValueError("times should be positive")
        return cls(seconds, nbytes)


def _route(text: str) -> Route:
    (route,) = RoutePlan.parse(text).routes
    return route


def machine() -> dict[str, str]:
    """Return what measurements of packed layers hold for."""
    return describe_machine(kernels.isas()[0] if kernels.available()["native"] == "ok" else "none")


def cache_at(path: str | Path | None) -> MeasurementCache[Measurement]:
    """Return the measurements in a JSON file and in this process.

    Raises:
        FormatError: the file is not an autotune cache, or its contents are invalid.
    """
    return MeasurementCache(path, machine(), Measurement.from_table, Measurement.to_table)


@torch.no_grad()
def measure(
    dense: nn.Module,
    packed_as: Callable[[RoutePlan], nn.Module],
    packed: Format,
    inputs: Sequence[tuple[int, Tensor]],
    patterns: Sequence[SparsityPattern],
    cold: bool,
    timer: Timer,
) -> Measurement:
    """Time every route in turn with the dense layer, on modules as they would run in the model.

    Args:
        dense: the layer.
        packed_as: its packed counterpart with a plan.
        packed: the weight.
        inputs: rows, and an input with as many.
        patterns: that the zeros satisfy.
        cold: whether the layer will find its weight in memory rather than in a cache, as in a model of many layers.
        timer: seconds from any origin.
    """
    x = inputs[0][1]
    routes = [r for r in kernels.candidates(packed, patterns) if r != DENSE and kernels.can_run(packed, r, x)]
    modules: dict[Route, Any] = {DENSE: dense, **{route: packed_as(RoutePlan((route,))) for route in routes}}
    evicting = torch.zeros(_EVICTED // 4) if cold else None
    seconds: Seconds = {}
    for rows, x in inputs:
        calls = {route: (lambda module=module, x=x: module(x)) for route, module in modules.items()}
        before = None if evicting is None else evicting.sum
        seconds[rows] = time_in_turn(calls, DENSE, timer, before, keep=(PREPACKED,))
    nbytes = {route: modules[route].runtime_nbytes for route in routes}
    return Measurement(seconds, {**nbytes, DENSE: x.dtype.itemsize * packed.shape[0] * packed.shape[1]})


def key_of(weight: Weight, packed: Format, layer_class: str, rows: Iterable[int], cold: bool) -> str:
    """Return the text under which layers that run alike share their measurement."""
    parts = (
        layer_class,
        f"{packed.shape[0]}x{packed.shape[1]}",
        packed.name,
        str(packed.pattern),
        f"{stored_share(packed):.2f}",
        dtype_name(packed.value_dtype),
        dtype_name(weight.dtype),
        ",".join(map(str, rows)),
        "cold" if cold else "warm",
    )
    return " ".join(parts)
