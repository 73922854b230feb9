"""Which weights of one layer go, and what do the others become?"""

from secateur.solvers._importance import RIA as RIA
from secateur.solvers._importance import Importance as Importance
from secateur.solvers._importance import Magnitude as Magnitude
from secateur.solvers._importance import Random as Random
from secateur.solvers._importance import Wanda as Wanda
from secateur.solvers._methods import METHODS as METHODS
from secateur.solvers._methods import WRAPPERS as WRAPPERS
from secateur.solvers._methods import method_from_dict as method_from_dict
from secateur.solvers._methods import method_name as method_name
from secateur.solvers._methods import method_to_dict as method_to_dict
from secateur.solvers._methods import parse_method as parse_method
from secateur.solvers._problem import LayerProblem as LayerProblem
from secateur.solvers._problem import Solution as Solution
from secateur.solvers._problem import Solver as Solver
from secateur.solvers._problem import verify as verify
from secateur.solvers._refit import Refit as Refit
from secateur.solvers._select import Select as Select
from secateur.solvers._sparsegpt import SparseGPT as SparseGPT
