"""Measure a packed layer by every route, and the dense layer, as they would run in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import kernels
from secateur._types import Weight, dtype_name
from secateur.formats import Format, stored_share, value_name
from secateur.kernels import DenseRoute, PrepackedRoute, Route, RoutePlan
from secateur.patterns import SparsityPattern
from secateur.timing import MeasurementCache, Timer, describe_machine, is_noisy, time_in_turn

DENSE, PREPACKED = DenseRoute(), PrepackedRoute()
# Bytes that are read between calls to remove a weight from the caches, as the other layers of a large model do.
_EVICTED = 32 << 20
_FEWEST = 5  # rounds of long calls; in a quarter of a second short ones get more
_STEP = 1.1  # from one density to the next that is measured apart

Seconds = dict[int, dict[Route, list[float]]]  # rows -> route -> seconds in each round; dropped routes have fewer


@dataclass(frozen=True)
class Measurement:
    """The measurement of layers that run alike.

    Args:
        seconds: by input rows and route, one number for each round. In each round the routes ran in turn.
            ``DenseRoute()`` is the dense layer itself.
        nbytes: bytes of memory that each route needs besides the stored weight.
    """

    seconds: Seconds
    nbytes: dict[Route, int]

    @property
    def noisy(self) -> bool:
        """Whether the machine was busy with something else."""
        return any(len(routes[DENSE]) > 1 and is_noisy(routes[DENSE]) for routes in self.seconds.values())

    def to_table(self) -> dict[str, Any]:
        """Return the measurement as JSON can hold it, with routes as text."""
        return {
            "seconds": {
                str(rows): {str(route): times for route, times in routes.items()}
                for rows, routes in self.seconds.items()
            },
            "nbytes": {str(route): nbytes for route, nbytes in self.nbytes.items()},
        }

    @classmethod
    def from_table(cls, table: Any) -> Measurement:
        """Return the measurement for a table that :meth:`to_table` of this or an earlier version returned.

        Raises:
            ValueError: not such a table. Also ``TypeError``, ``KeyError``, ``AttributeError`` or ``OverflowError``.
        """
        seconds = {
            int(rows): {_route(text): [float(s) for s in times] for text, times in routes.items()}
            for rows, routes in table["seconds"].items()
        }
        nbytes = {_route(text): int(n) for text, n in table["nbytes"].items()}
        if not seconds or min(seconds) < 1 or DENSE not in nbytes or any(n < 0 for n in nbytes.values()):
            raise ValueError("rows should be above 0, bytes not negative, and the dense layer should be there")
        for routes in seconds.values():
            if routes.keys() != nbytes.keys() or not all(routes.values()):
                raise ValueError("every route should have times and bytes")
            if not all(0 < s < math.inf for times in routes.values() for s in times):
                raise ValueError("times should be above 0 and finite")
        return cls(seconds, nbytes)


def _route(text: str) -> Route:
    (route,) = RoutePlan.parse(text).routes
    return route


def machine() -> dict[str, str]:
    """Return the machine that measurements of packed layers are made on."""
    return describe_machine(kernels.isas()[0] if kernels.available()["native"] == "ok" else "none")


def cache_at(path: str | Path | None) -> MeasurementCache[Measurement]:
    """Return the measurements in a JSON file and in this process.

    Args:
        path: of the file, which need not exist; None for the process only.

    Raises:
        FormatError: the file is not an autotune cache, its contents are invalid, or it cannot be written.
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
    precisions: Collection[str] = ("exact",),
) -> Measurement:
    """Measure every route in turn with the dense layer, on modules as they would run in the model.

    Args:
        dense: the dense layer.
        packed_as: returns the packed layer, given its plan.
        packed: the packed weight.
        inputs: numbers of input rows, each with an input that has them.
        patterns: the patterns that the zeros satisfy.
        cold: whether the layer will find its weight in memory and not in a cache, as in a model of many layers.
        timer: returns seconds since any fixed time.
        precisions: the arithmetic that routes may have.
    """
    x = inputs[0][1]
    routes = [
        r for r in kernels.candidates(packed, patterns, precisions) if r != DENSE and kernels.can_run(packed, r, x)
    ]
    modules: dict[Route, Any] = {DENSE: dense, **{route: packed_as(RoutePlan((route,))) for route in routes}}
    evicting = torch.zeros(_EVICTED // 4) if cold else None
    seconds: Seconds = {}
    for rows, x in inputs:
        calls = {route: (lambda module=module, x=x: module(x)) for route, module in modules.items()}
        before = None if evicting is None else evicting.sum
        seconds[rows] = time_in_turn(calls, DENSE, timer, before, keep=(PREPACKED,), fewest=_FEWEST)
    nbytes = {route: modules[route].runtime_nbytes for route in routes}
    return Measurement(seconds, {**nbytes, DENSE: x.dtype.itemsize * packed.shape[0] * packed.shape[1]})


def key_of(
    weight: Weight,
    packed: Format,
    patterns: Iterable[SparsityPattern],
    layer_class: str,
    rows: Iterable[int],
    cold: bool,
    precisions: Sequence[str] = ("exact",),
) -> str:
    """Return the key of a measurement, which is the same for all layers that run alike.

    Of the patterns that the zeros satisfy only the routes count that they allow. Random zeros satisfy a pattern such as
    14:16 by chance, in one layer and not in the next. Densities are alike if they differ by no more than a tenth.
    """
    allowed, density = "+".join(precisions), stored_share(packed)
    found = kernels.candidates(packed, tuple(patterns), precisions)
    routes = (str(route) for route in found if route not in (DENSE, PREPACKED))
    parts = (
        layer_class,
        f"{packed.shape[0]}x{packed.shape[1]}",
        packed.name,
        str(packed.pattern),
        "+".join(routes) or "-",
        f"{_STEP ** round(math.log(density, _STEP)):.2f}" if density else "0",
        value_name(packed.value_dtype),
        dtype_name(weight.dtype),
        ",".join(map(str, rows)),
        "cold" if cold else "warm",
        *((allowed,) if allowed != "exact" else ()),  # version 0.1 knew no other
    )
    return " ".join(parts)
