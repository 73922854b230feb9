"""How is a whole model pruned in one call?"""

from secateur.pruning._prune import prune_ as prune_
from secateur.pruning._recipe import METHODS as METHODS
from secateur.pruning._recipe import Recipe as Recipe
from secateur.pruning._recipe import method_name as method_name
from secateur.pruning._recipe import parse_method as parse_method
