"""Sparse training: masks that move while a model learns."""

from secateur.training._lottery import LotteryTicket as LotteryTicket
from secateur.training._methods import SET as SET
from secateur.training._methods import SRSTE as SRSTE
from secateur.training._methods import Gate as Gate
from secateur.training._methods import GradualMagnitude as GradualMagnitude
from secateur.training._methods import Method as Method
from secateur.training._methods import RigL as RigL
from secateur.training._methods import Static as Static
from secateur.training._session import SparseTraining as SparseTraining
