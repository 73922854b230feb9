"""The one table of formats: a format is a file, and its two lines here."""

from secateur.formats._bitmask import Bitmask
from secateur.formats._block import BlockPacked
from secateur.formats._column import ColumnPacked
from secateur.formats._format import Format
from secateur.formats._nm import NMPacked
from secateur.formats._row import RowPacked

__all__ = ["Bitmask", "BlockPacked", "ColumnPacked", "NMPacked", "RowPacked"]

# By their name in files. Of formats that need as many bytes, the later one is chosen: the first holds any mask.
FORMATS: dict[str, type[Format]] = {
    format_type.name: format_type for format_type in (Bitmask, NMPacked, BlockPacked, RowPacked, ColumnPacked)
}
