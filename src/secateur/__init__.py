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
from secateur.calibration import LayerStatistics as LayerStatistics
from secateur.calibration import bucket as bucket
from secateur.comparison import compare as compare
from secateur.evaluation import Pooling as Pooling
from secateur.evaluation import evaluate as evaluate
from secateur.exporting import export as export
from secateur.folding import FoldReport as FoldReport
from secateur.folding import fold_ as fold_
from secateur.layers import LayerKind as LayerKind
from secateur.layers import register_layer as register_layer
from secateur.nn import PackedLinear as PackedLinear
from secateur.nn import SparseConv2d as SparseConv2d
from secateur.nn import SparseLinear as SparseLinear
from secateur.nn import densify_ as densify_
from secateur.nn import sparsify_ as sparsify_
from secateur.packing import PackSettings as PackSettings
from secateur.packing import load as load
from secateur.packing import pack_ as pack_
from secateur.packing import save as save
from secateur.packing import unpack_ as unpack_
from secateur.patterns import NM as NM
from secateur.patterns import Block as Block
from secateur.patterns import Column as Column
from secateur.patterns import Row as Row
from secateur.patterns import SparsityPattern as SparsityPattern
from secateur.patterns import TransposableNM as TransposableNM
from secateur.patterns import Unstructured as Unstructured
from secateur.permuting import PermutationReport as PermutationReport
from secateur.permuting import permute_ as permute_
from secateur.pipeline import Pipeline as Pipeline
from secateur.planning import Plan as Plan
from secateur.planning import plan as plan
from secateur.pruning import Recipe as Recipe
from secateur.pruning import allocate as allocate
from secateur.pruning import prune_ as prune_
from secateur.recovery import recover_ as recover_
from secateur.reports import AllocatedLayer as AllocatedLayer
from secateur.reports import AllocationReport as AllocationReport
from secateur.reports import Choice as Choice
from secateur.reports import ComparisonReport as ComparisonReport
from secateur.reports import Evaluation as Evaluation
from secateur.reports import EvaluationReport as EvaluationReport
from secateur.reports import ExportReport as ExportReport
from secateur.reports import Figure as Figure
from secateur.reports import Histogram as Histogram
from secateur.reports import LayerReport as LayerReport
from secateur.reports import ModelTime as ModelTime
from secateur.reports import ModelWeights as ModelWeights
from secateur.reports import PackedLayer as PackedLayer
from secateur.reports import PackReport as PackReport
from secateur.reports import PipelineReport as PipelineReport
from secateur.reports import PlanReport as PlanReport
from secateur.reports import RecoveryReport as RecoveryReport
from secateur.reports import Report as Report
from secateur.reports import ShrinkReport as ShrinkReport
from secateur.reports import SkippedLayer as SkippedLayer
from secateur.reports import Verification as Verification
from secateur.shrinking import shrink_ as shrink_
from secateur.solvers import ADMM as ADMM
from secateur.solvers import ALPS as ALPS
from secateur.solvers import RIA as RIA
from secateur.solvers import Fisher as Fisher
from secateur.solvers import Importance as Importance
from secateur.solvers import LayerProblem as LayerProblem
from secateur.solvers import Magnitude as Magnitude
from secateur.solvers import Movement as Movement
from secateur.solvers import Random as Random
from secateur.solvers import Refit as Refit
from secateur.solvers import Select as Select
from secateur.solvers import Solution as Solution
from secateur.solvers import Solver as Solver
from secateur.solvers import SparseGPT as SparseGPT
from secateur.solvers import Swaps as Swaps
from secateur.solvers import Taylor as Taylor
from secateur.solvers import Wanda as Wanda
from secateur.solvers import verify as verify
from secateur.training import GroupSparsity as GroupSparsity
from secateur.training import LotteryTicket as LotteryTicket
from secateur.training import SparseTraining as SparseTraining
from secateur.zeros import apply_masks_ as apply_masks_
from secateur.zeros import masks as masks

__version__ = _version("secateur")
