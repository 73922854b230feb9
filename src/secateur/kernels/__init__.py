"""How is a packed weight multiplied? ``y = x W^T + b`` by native kernels where they can run, else by a reference.

>>> import torch
>>> from secateur import kernels
>>> weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
>>> packed = kernels.BitmaskLayout.pack(weight)
>>> kernels.linear(torch.tensor([[1.0, 10.0]]), packed)
tensor([[20.,  3.]])
"""

from secateur.kernels._interception import is_plain as is_plain
from secateur.kernels._interception import is_watched as is_watched
from secateur.kernels._layouts import BitmaskLayout as BitmaskLayout
from secateur.kernels._layouts import LaneLayout as LaneLayout
from secateur.kernels._layouts import Layout as Layout
from secateur.kernels._layouts import PanelLayout as PanelLayout
from secateur.kernels._layouts import StripLayout as StripLayout
from secateur.kernels._linear import available as available
from secateur.kernels._linear import current_isa as current_isa
from secateur.kernels._linear import explain as explain
from secateur.kernels._linear import isas as isas
from secateur.kernels._linear import linear as linear
from secateur.kernels._linear import use as use
from secateur.kernels._masks import gate as gate
from secateur.kernels._masks import gate_backward as gate_backward
from secateur.kernels._masks import times_units as times_units
from secateur.kernels._masks import unit_sums as unit_sums
from secateur.kernels._routes import Plan as Plan
from secateur.kernels._routes import Runner as Runner
from secateur.kernels._routes import candidates as candidates
from secateur.kernels._routes import default_plan as default_plan
from secateur.kernels._routes import make_runner as make_runner
from secateur.kernels._routes import padded as padded
from secateur.kernels._routes import stored_share as stored_share
from secateur.kernels._routes import why_not_prepacked as why_not_prepacked
