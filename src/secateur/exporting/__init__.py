"""How does a model get into another engine?"""

from secateur.exporting._packed_nodes import OPERATION as OPERATION
from secateur.exporting._packed_nodes import PackedNodes as PackedNodes
from secateur.exporting._packed_nodes import layout_for as layout_for
from secateur.exporting._packed_nodes import pack_nodes as pack_nodes
