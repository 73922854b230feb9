"""Sparse training: masks that move while a model learns."""

from secateur.training._group_sparsity import GroupSparsity as GroupSparsity
from secateur.training._lottery import LotteryTicket as LotteryTicket
from secateur.training._methods import SET as SET
from secateur.training._methods import SRSTE as SRSTE
from secateur.training._methods import Gate as Gate
from secateur.training._methods import GradualMagnitude as GradualMagnitude
from secateur.training._methods import Method as Method
from secateur.training._methods import RigL as RigL
from secateur.training._methods import Static as Static
from secateur.training._methods import exchange as exchange
from secateur.training._methods import parse_method as parse_method
from secateur.training._session import SparseTraining as SparseTraining
from secateur.training._targets import MaskedWeight as MaskedWeight
