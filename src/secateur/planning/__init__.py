"""What is the best that can be made of a model for a target, on this machine?"""

from secateur.planning._directory import plan_directory as plan_directory
from secateur.planning._means import ALLOWED as ALLOWED
from secateur.planning._means import ENGINES as ENGINES
from secateur.planning._optimize import optimize_directory as optimize_directory
from secateur.planning._optimize_module import optimize_ as optimize_
from secateur.planning._plan import Plan as Plan
from secateur.planning._plan import plan as plan
from secateur.planning._target import MaxLoss as MaxLoss
from secateur.planning._target import Target as Target
