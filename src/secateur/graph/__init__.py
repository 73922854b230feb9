"""Which parts of a model go together, and which of them could go?"""

from secateur.graph._blocks import find_blocks as find_blocks
from secateur.graph._experts import find_experts as find_experts
from secateur.graph._find import find_units as find_units
from secateur.graph._reference import stream_in as stream_in
from secateur.graph._reference import stream_out as stream_out
from secateur.graph._reference import without as without
from secateur.graph._removal import Removal as Removal
from secateur.graph._removal import check_units as check_units
from secateur.graph._units import KINDS as KINDS
from secateur.graph._units import Dimension as Dimension
from secateur.graph._units import Graph as Graph
from secateur.graph._units import Kind as Kind
from secateur.graph._units import Place as Place
from secateur.reports import Boundary as Boundary
