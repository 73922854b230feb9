"""Which weights may be pruned together, and which masks does that allow?"""

from secateur.patterns._find import satisfied as satisfied
from secateur.patterns._pattern import NM as NM
from secateur.patterns._pattern import Block as Block
from secateur.patterns._pattern import Column as Column
from secateur.patterns._pattern import Row as Row
from secateur.patterns._pattern import Scope as Scope
from secateur.patterns._pattern import SparsityPattern as SparsityPattern
from secateur.patterns._pattern import Unstructured as Unstructured
from secateur.patterns._pattern import check_sparsity as check_sparsity
from secateur.patterns._pattern import cut_between as cut_between
from secateur.patterns._pattern import keep_top as keep_top
from secateur.patterns._pattern import kth_smallest as kth_smallest
from secateur.patterns._pattern import on_the_way as on_the_way
from secateur.patterns._pattern import units_to_prune as units_to_prune
from secateur.patterns._pattern import with_channel_width as with_channel_width
from secateur.patterns._pattern import with_scope as with_scope
