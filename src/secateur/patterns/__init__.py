"""Which weights are pruned together, and which masks does that allow?"""

from secateur.patterns._classes import NM as NM
from secateur.patterns._classes import Block as Block
from secateur.patterns._classes import Column as Column
from secateur.patterns._classes import Row as Row
from secateur.patterns._classes import TransposableNM as TransposableNM
from secateur.patterns._classes import Unstructured as Unstructured
from secateur.patterns._classes import along_rows as along_rows
from secateur.patterns._classes import as_pattern as as_pattern
from secateur.patterns._classes import at_partial_sparsity as at_partial_sparsity
from secateur.patterns._classes import check_independent as check_independent
from secateur.patterns._classes import with_channel_width as with_channel_width
from secateur.patterns._classes import with_dense_remainder as with_dense_remainder
from secateur.patterns._classes import with_scope as with_scope
from secateur.patterns._find import may_come_from as may_come_from
from secateur.patterns._find import satisfied as satisfied
from secateur.patterns._pattern import Remainder as Remainder
from secateur.patterns._pattern import Scope as Scope
from secateur.patterns._pattern import SparsityPattern as SparsityPattern
from secateur.patterns._pattern import check_sparsity as check_sparsity
from secateur.patterns._select import cut_between as cut_between
from secateur.patterns._select import keep_top as keep_top
from secateur.patterns._select import kth_smallest as kth_smallest
from secateur.patterns._select import units_to_prune as units_to_prune
from secateur.patterns._units import Units as Units
