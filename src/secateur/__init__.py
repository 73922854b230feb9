"""secateur makes PyTorch models sparse and gets the benefit.

One :class:`SparsityPattern` is the word that every stage speaks: scores, solvers, reports, and in time formats and
kernels. :func:`prune_` prunes a model in one call.
"""

from importlib.metadata import version as _version

from secateur._errors import FormatError as FormatError
from secateur._errors import KernelError as KernelError
from secateur._errors import PatternError as PatternError
from secateur._errors import RecipeError as RecipeError
from secateur._errors import SolverError as SolverError
from secateur._errors import SparsityError as SparsityError
from secateur._errors import StatisticsError as StatisticsError
from secateur._group import GroupSparsity as GroupSparsity
from secateur._importance import RIA as RIA
from secateur._importance import Importance as Importance
from secateur._importance import Magnitude as Magnitude
from secateur._importance import Random as Random
from secateur._importance import Wanda as Wanda
from secateur._layers import LayerKind as LayerKind
from secateur._layers import register_layer as register_layer
from secateur._oneshot import prune_ as prune_
from secateur._packedmodel import load as load
from secateur._packedmodel import save as save
from secateur._packing import pack_ as pack_
from secateur._packing import unpack_ as unpack_
from secateur._pattern import NM as NM
from secateur._pattern import Block as Block
from secateur._pattern import Column as Column
from secateur._pattern import Row as Row
from secateur._pattern import SparsityPattern as SparsityPattern
from secateur._pattern import Unstructured as Unstructured
from secateur._recipe import Recipe as Recipe
from secateur._report import Evaluation as Evaluation
from secateur._report import Histogram as Histogram
from secateur._report import LayerReport as LayerReport
from secateur._report import Report as Report
from secateur._report import SkippedLayer as SkippedLayer
from secateur._statistics import LayerStatistics as LayerStatistics
from secateur.nn import PackedLinear as PackedLinear
from secateur.nn import SparseConv2d as SparseConv2d
from secateur.nn import SparseLinear as SparseLinear
from secateur.nn import densify_ as densify_
from secateur.nn import sparsify_ as sparsify_
from secateur.solvers import LayerProblem as LayerProblem
from secateur.solvers import Refit as Refit
from secateur.solvers import Select as Select
from secateur.solvers import Solution as Solution
from secateur.solvers import Solver as Solver
from secateur.solvers import SparseGPT as SparseGPT
from secateur.solvers import verify as verify
from secateur.training import LotteryTicket as LotteryTicket
from secateur.training import SparseTraining as SparseTraining

__version__ = _version("secateur")
