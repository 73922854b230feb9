"""Which batch norms can be part of the layer before them, exactly?"""

from secateur.folding._fold import FoldedNorm as FoldedNorm
from secateur.folding._fold import FoldReport as FoldReport
from secateur.folding._fold import LeftNorm as LeftNorm
from secateur.folding._fold import fold_ as fold_
