"""How is a packed weight multiplied? ``y = x W^T + b``, by native kernels where they can run, else by a reference.

>>> import torch
>>> from secateur import kernels
>>> weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
>>> packed = kernels.BitmaskLayout.pack(weight)
>>> kernels.linear(torch.tensor([[1.0, 10.0]]), packed)
tensor([[20.,  3.]])
"""

import warnings
from typing import Any

from secateur.kernels._backends import Backend as Backend
from secateur.kernels._backends import available as available
from secateur.kernels._backends import can_run as can_run
from secateur.kernels._backends import current_isa as current_isa
from secateur.kernels._backends import explain_route as explain_route
from secateur.kernels._backends import isas as isas
from secateur.kernels._backends import prepare as prepare
from secateur.kernels._backends import use as use
from secateur.kernels._blob import to_bytes as to_bytes
from secateur.kernels._convolution import packed_convolution as packed_convolution
from secateur.kernels._dense import multiplies_bfloat16 as multiplies_bfloat16
from secateur.kernels._dispatch import is_intercepted as is_intercepted
from secateur.kernels._keep_memory import keep_memory as keep_memory
from secateur.kernels._layout import Layout as Layout
from secateur.kernels._layout import with_spare_values as with_spare_values
from secateur.kernels._linear import explain as explain
from secateur.kernels._linear import linear as linear
from secateur.kernels._masks import gate as gate
from secateur.kernels._masks import gate_backward as gate_backward
from secateur.kernels._masks import times_units as times_units
from secateur.kernels._masks import unit_sums as unit_sums
from secateur.kernels._operator import FLOATS as FLOATS
from secateur.kernels._operator import PackedSpec as PackedSpec
from secateur.kernels._operator import check_bias as check_bias
from secateur.kernels._operator import check_dense as check_dense
from secateur.kernels._operator import packed_dense as packed_dense
from secateur.kernels._operator import packed_linear as packed_linear
from secateur.kernels._operator import runtime_nbytes as runtime_nbytes
from secateur.kernels._plan import RoutePlan as RoutePlan
from secateur.kernels._plan import candidates as candidates
from secateur.kernels._plan import default_plan as default_plan
from secateur.kernels._plan import usable_plan as usable_plan
from secateur.kernels._prepared import in_channels_last as in_channels_last
from secateur.kernels._route import PRECISIONS as PRECISIONS
from secateur.kernels._route import Route as Route
from secateur.kernels._table import *  # noqa: F403  the layouts and routes themselves
from secateur.kernels._window import Pair as Pair
from secateur.kernels._window import Window as Window

_FORMERLY = {"LaneLayout": "GroupLayout", "StripLayout": "TileLayout"}


def __getattr__(name: str) -> Any:
    """Return what a name of version 0.1 is called now."""
    if name in _FORMERLY:
        new = _FORMERLY[name]
        warnings.warn(f"secateur.kernels.{name} is now called {new}.", DeprecationWarning, stacklevel=2)
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
