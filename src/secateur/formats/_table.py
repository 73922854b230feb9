"""The table of formats. A new format is one file, and its name in two lines here."""

from secateur.formats._bitmask import Bitmask
from secateur.formats._block import BlockPacked
from secateur.formats._column import ColumnPacked
from secateur.formats._dense import DensePacked
from secateur.formats._format import Format
from secateur.formats._nm import NMPacked
from secateur.formats._row import RowPacked

__all__ = ["Bitmask", "BlockPacked", "ColumnPacked", "DensePacked", "NMPacked", "RowPacked"]

# By their name in files. Of formats of the same size `choose` takes the later one. Bitmask holds any mask. DensePacked,
# which is no smaller than the dense weight, comes before it, so that nothing takes it that was not asked for it.
FORMATS: dict[str, type[Format]] = {
    format_type.name: format_type
    for format_type in (DensePacked, Bitmask, NMPacked, BlockPacked, RowPacked, ColumnPacked)
}
