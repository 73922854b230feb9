"""How does a model get into another engine?"""

from secateur.exporting._directory import export_directory as export_directory
from secateur.exporting._export import export as export
from secateur.exporting._opened import exported_bytes as exported_bytes
from secateur.exporting._opened import is_exported as is_exported
from secateur.exporting._opened import open_exported as open_exported
from secateur.exporting._opened import read_report as read_report
from secateur.exporting._packed_nodes import OPERATION as OPERATION
from secateur.exporting._packed_nodes import PackedNodes as PackedNodes
from secateur.exporting._packed_nodes import layout_for as layout_for
from secateur.exporting._packed_nodes import layout_in_bytes as layout_in_bytes
from secateur.exporting._packed_nodes import pack_nodes as pack_nodes
from secateur.exporting._settings import ExportSettings as ExportSettings
