"""How does a model become sparse while it learns?"""

from secateur.training._exchange import exchange as exchange
from secateur.training._group_sparsity import GroupSparsity as GroupSparsity
from secateur.training._lottery import LotteryTicket as LotteryTicket
from secateur.training._method import Method as Method
from secateur.training._method import Progress as Progress
from secateur.training._methods import METHODS as METHODS
from secateur.training._methods import SET as SET
from secateur.training._methods import SRSTE as SRSTE
from secateur.training._methods import Gate as Gate
from secateur.training._methods import GradualMagnitude as GradualMagnitude
from secateur.training._methods import RigL as RigL
from secateur.training._methods import Static as Static
from secateur.training._methods import as_method as as_method
from secateur.training._methods import parse_method as parse_method
from secateur.training._settings import TrainingSettings as TrainingSettings
from secateur.training._sparse_training import SparseTraining as SparseTraining
from secateur.training._weights import LearnedWeight as LearnedWeight
from secateur.training._weights import MaskedWeight as MaskedWeight
