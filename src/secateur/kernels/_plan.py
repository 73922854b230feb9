"""The choice of routes: which ones are candidates, and which one to take for how many input rows.

The text of a plan, such as ``bitmask@2 panels:128x256``, means: bitmask up to 2 input rows, panels for more.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from secateur._errors import KernelError
from secateur.formats import BlockPacked, ColumnPacked, DensePacked, Format, NMPacked, RowPacked, stored_share
from secateur.kernels._backends import explain_route, has_kernels
from secateur.kernels._bitmask import BitmaskRoute
from secateur.kernels._compact import ColumnRoute, RowRoute
from secateur.kernels._dense import DenseRoute
from secateur.kernels._groups import GroupRoute
from secateur.kernels._panels import PanelRoute
from secateur.kernels._route import PRECISIONS, Route
from secateur.kernels._table import ROUTES, read_route
from secateur.kernels._tiles import TileRoute
from secateur.patterns import NM, Block, SparsityPattern


@dataclass(frozen=True)
class RoutePlan:
    """Which route to take for how many input rows.

    Args:
        routes: one or more.
        limits: for each route except the last, the largest number of input rows that takes it. They increase.

    Raises:
        KernelError: there is not one limit for each route except the last, or the limits do not increase.

    Example:
        >>> from secateur.kernels import RoutePlan
        >>> plan = RoutePlan.parse("bitmask@2 panels:128x256")
        >>> plan.route(2), plan.route(3)
        (BitmaskRoute(), PanelRoute(height=128, width=256))
    """

    routes: tuple[Route, ...]
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.routes) != len(self.limits) + 1 or list(self.limits) != sorted(set(self.limits)):
            raise KernelError(
                f"A plan of routes has one limit for each route except the last, and its limits increase. Got limits "
                f"{self.limits} for {len(self.routes)} routes."
            )

    def route(self, rows: int) -> Route:
        """Return the route to take for a number of input rows."""
        for route, limit in zip(self.routes, self.limits, strict=False):
            if rows <= limit:
                return route
        return self.routes[-1]

    @property
    def precision(self) -> str:
        """The arithmetic of the least exact of its routes: "exact", "bfloat16" or "int8"."""
        return max((route.precision for route in self.routes), key=PRECISIONS.index)

    def __str__(self) -> str:
        limited = (f"{route}@{limit}" for route, limit in zip(self.routes, self.limits, strict=False))
        return " ".join((*limited, str(self.routes[-1])))

    @classmethod
    def parse(cls, text: str) -> RoutePlan:
        """Return the plan that a text names. This is the inverse of ``str``. Texts of earlier versions are read, too.

        Raises:
            KernelError: the text is not a plan.
        """
        return _parse(text)

    @classmethod
    def of(cls, choices: Sequence[tuple[int, Route]]) -> RoutePlan:
        """Return the plan that takes the route of the nearest batch, where near means a ratio close to 1.

        Args:
            choices: pairs of a batch, in input rows, and its route, by increasing batch.
        """
        routes, limits = [choices[0][1]], []
        for (batch, route), (following, next_route) in pairwise(choices):
            if route != next_route:
                limits.append(int((batch * following) ** 0.5))
                routes.append(next_route)
        return cls(tuple(routes), tuple(limits))

    @property
    def ways(self) -> tuple[str, ...]:
        """The routes as text. This is the name that ``routes`` had in version 0.1."""
        _deprecated("RoutePlan.ways", "RoutePlan.routes")
        return tuple(map(str, self.routes))

    def way(self, rows: int) -> str:
        """Return the route for a number of input rows as text. ``route`` had this name in version 0.1."""
        _deprecated("RoutePlan.way", "RoutePlan.route")
        return str(self.route(rows))


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated, use {new}.", DeprecationWarning, stacklevel=3)


@lru_cache(maxsize=1024)
def _parse(text: str) -> RoutePlan:
    *first, last = text.split(" ")
    names, limits = [], []
    for part in first:
        name, _, limit = part.partition("@")
        if not re.fullmatch(r"[1-9]\d{0,8}|0", limit):
            raise _not_a_plan(text)
        names.append(name)
        limits.append(int(limit))
    routes = tuple(route for name in (*names, last) if (route := read_route(name)) is not None)
    if limits != sorted(set(limits)) or len(routes) <= len(names):
        raise _not_a_plan(text)
    return RoutePlan(routes, tuple(limits))


def _not_a_plan(text: str) -> KernelError:
    return KernelError(
        f"{text!r:.200} is not a plan of routes. A plan looks like 'bitmask@2 panels:128x256': its limits increase, "
        "and the last route has none. pack_ makes a plan from measurements."
    )


def candidates(
    packed: Format, patterns: Sequence[SparsityPattern] = (), precision: str | Collection[str] = "exact"
) -> list[Route]:
    """Return the routes that are worth measuring for a weight, those of dense arithmetic last.

    Args:
        packed: the weight.
        patterns: further patterns that its zeros satisfy, besides the one of the format.
        precision: the arithmetic that is allowed: "exact", "bfloat16" or "int8", or several of them.
    """
    allowed = (precision,) if isinstance(precision, str) else precision
    density, known = stored_share(packed), tuple(dict.fromkeys((packed.pattern, *patterns)))
    native = has_kernels() and bool(packed.shape[0] and packed.shape[1])
    return [
        route
        for route_type in ROUTES
        if route_type.precision in allowed
        for route in route_type.candidates(packed, known, density)
        if native or not route.needs_kernels
    ]


def default_plan(packed: Format, precision: str = "exact") -> RoutePlan:
    """Return a plan for a weight that was not measured: by its format, and without native kernels dense.

    Args:
        packed: the weight.
        precision: the arithmetic of the plan. Where no route of it runs on this machine, the plan is exact.
    """
    rows, columns = packed.shape
    if precision != "exact":
        for route in candidates(packed, (), precision):
            if _runs_here(packed, route):
                return RoutePlan((route,))
    match packed, packed.pattern:
        case RowPacked(), _:
            return RoutePlan((RowRoute(),))
        case ColumnPacked(), _:
            return RoutePlan((ColumnRoute(),))
        case _ if isinstance(packed, DensePacked) or not has_kernels():
            return RoutePlan((DenseRoute(),))
        case NMPacked(), NM(n, m) if n and columns % m == 0:
            return RoutePlan((GroupRoute(n, m),))
        case BlockPacked(), Block(height, width) if not (rows % height or columns % width):
            return RoutePlan((TileRoute(height, width),))
    # benchmarks/kernels.py: the bitmask is mostly the fastest up to 2 input rows, and panels for more.
    return RoutePlan((BitmaskRoute(), PanelRoute()), (2,))


def usable_plan(packed: Format, text: str, same_machine: bool = True) -> RoutePlan:
    """Return the plan that a file has for a weight, if all its routes can run the weight, else a plan by default.

    A plan is not needed to read a weight. So a plan of an unknown version, or one for kernels of another machine, is
    not an error: only the result of a measurement is lost. The plan by default has the arithmetic of the one in the
    file, where this machine can.

    Args:
        packed: the weight.
        text: of the plan.
        same_machine: whether the plan was measured on a machine like this one.
    """
    try:
        plan = RoutePlan.parse(text)
    except KernelError:
        return default_plan(packed)
    runs = all(route.why_not(packed) is None and _runs_here(packed, route) for route in plan.routes)
    return plan if same_machine and runs else default_plan(packed, plan.precision)


def _runs_here(packed: Format, route: Route) -> bool:
    """Whether this machine runs a route of a weight fast, wherever the weight is now."""
    if route.needs_kernels:
        return has_kernels()
    cpu = torch.device("cpu")
    return any(reason is None for _, reason in explain_route(packed, route, cpu, torch.float32))
