"""How is a whole model pruned in one call?"""

from secateur.pruning._allocation import ALLOCATIONS as ALLOCATIONS
from secateur.pruning._directory import prune_directory as prune_directory
from secateur.pruning._prune import prune_ as prune_
from secateur.pruning._recipe import Recipe as Recipe
