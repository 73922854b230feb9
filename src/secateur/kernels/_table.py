"""The table of routes. A new route is one file, and its lines here."""

from secateur.kernels._bitmask import BitmaskLayout, BitmaskRoute
from secateur.kernels._compact import ColumnRoute, Int8ColumnRoute, Int8RowRoute, RowRoute
from secateur.kernels._dense import DenseRoute, PrepackedBfloat16Route, PrepackedRoute
from secateur.kernels._groups import GroupLayout, GroupRoute
from secateur.kernels._int4_bitmask import Int4BitmaskLayout, Int4BitmaskRoute
from secateur.kernels._int4_panels import Int4PanelLayout, Int4PanelRoute
from secateur.kernels._int8_bitmask import Int8BitmaskLayout, Int8BitmaskRoute
from secateur.kernels._int8_panels import Int8PanelLayout, Int8PanelRoute
from secateur.kernels._int8_tiles import Int8TileLayout, Int8TileRoute
from secateur.kernels._panels import PanelLayout, PanelRoute
from secateur.kernels._route import Route
from secateur.kernels._tiles import TileLayout, TileRoute

__all__ = [
    "BitmaskLayout",
    "BitmaskRoute",
    "ColumnRoute",
    "DenseRoute",
    "GroupLayout",
    "GroupRoute",
    "Int4BitmaskLayout",
    "Int4BitmaskRoute",
    "Int4PanelLayout",
    "Int4PanelRoute",
    "Int8BitmaskLayout",
    "Int8BitmaskRoute",
    "Int8ColumnRoute",
    "Int8PanelLayout",
    "Int8PanelRoute",
    "Int8RowRoute",
    "Int8TileLayout",
    "Int8TileRoute",
    "PanelLayout",
    "PanelRoute",
    "PrepackedBfloat16Route",
    "PrepackedRoute",
    "RowRoute",
    "TileLayout",
    "TileRoute",
]

# In the order of candidates: routes for a few weights first, dense arithmetic last.
ROUTES: tuple[type[Route], ...] = (
    RowRoute,
    ColumnRoute,
    GroupRoute,
    TileRoute,
    BitmaskRoute,
    PanelRoute,
    Int8RowRoute,
    Int8ColumnRoute,
    Int4BitmaskRoute,
    Int4PanelRoute,
    Int8TileRoute,
    Int8BitmaskRoute,
    Int8PanelRoute,
    PrepackedBfloat16Route,
    PrepackedRoute,
    DenseRoute,
)

# The beginnings of texts that version 0.1 wrote, and what they are now.
_FORMERLY = {"lanes:": "groups:", "strips:": "tiles:", "rows:strips": "rows:tiles", "columns:strips": "columns:tiles"}


def read_route(text: str) -> Route | None:
    """Return the route that a text names, or None."""
    for old, new in _FORMERLY.items():
        if text.startswith(old):
            text = new + text.removeprefix(old)
    return next(filter(None, (route_type.read(text) for route_type in ROUTES)), None)
