"""How is a sparse weight stored?"""

from secateur.formats._formats import FORMATS as FORMATS
from secateur.formats._formats import MAX_SIDE as MAX_SIDE
from secateur.formats._formats import VALUE_DTYPES as VALUE_DTYPES
from secateur.formats._formats import Bitmask as Bitmask
from secateur.formats._formats import BlockPacked as BlockPacked
from secateur.formats._formats import ColumnPacked as ColumnPacked
from secateur.formats._formats import Format as Format
from secateur.formats._formats import NMPacked as NMPacked
from secateur.formats._formats import RowPacked as RowPacked
from secateur.formats._formats import check_shape as check_shape
from secateur.formats._formats import choose as choose
from secateur.formats._formats import population as population
