"""How is a sparse weight stored?"""

from secateur.formats._arrays import check_shape as check_shape
from secateur.formats._arrays import check_sizes as check_sizes
from secateur.formats._arrays import population as population
from secateur.formats._choose import choose as choose
from secateur.formats._choose import pack as pack
from secateur.formats._choose import stored_share as stored_share
from secateur.formats._format import Format as Format
from secateur.formats._format import check_mask as check_mask
from secateur.formats._format import check_weight as check_weight
from secateur.formats._from_sparse import from_scipy as from_scipy
from secateur.formats._from_sparse import from_torch as from_torch
from secateur.formats._grid import GRIDS as GRIDS
from secateur.formats._grid import Grid as Grid
from secateur.formats._grid import int4_codes as int4_codes
from secateur.formats._table import *  # noqa: F403  the formats themselves
from secateur.formats._table import FORMATS as FORMATS
from secateur.formats._values import UNSCALED_DTYPES as UNSCALED_DTYPES
from secateur.formats._values import VALUE_DTYPES as VALUE_DTYPES
from secateur.formats._values import VALUE_TYPES as VALUE_TYPES
from secateur.formats._values import ValueType as ValueType
from secateur.formats._values import as_value_dtype as as_value_dtype
from secateur.formats._values import encode as encode
from secateur.formats._values import is_scaled as is_scaled
