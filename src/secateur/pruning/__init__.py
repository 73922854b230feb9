"""How is a whole model pruned in one call?"""

from secateur.pruning._allocate import allocate as allocate
from secateur.pruning._allocation import ALLOCATIONS as ALLOCATIONS
from secateur.pruning._directory import allocate_directory as allocate_directory
from secateur.pruning._directory import prune_directory as prune_directory
from secateur.pruning._effect import OutputEffect as OutputEffect
from secateur.pruning._prepare import needs_text as needs_text
from secateur.pruning._prune import prune_ as prune_
from secateur.pruning._recipe import Recipe as Recipe
from secateur.pruning._solve import Chosen as Chosen
from secateur.pruning._solve import Option as Option
from secateur.pruning._solve import choose as choose
from secateur.pruning._solve import choose_many as choose_many
