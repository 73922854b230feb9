"""Which layers learn their mask, which run packed, and how are they put into a model?"""

from secateur.nn._counterpart import Packed as Packed
from secateur.nn._counterpart import PackedAs as PackedAs
from secateur.nn._counterpart import linear_of as linear_of
from secateur.nn._counterpart import packed_layers as packed_layers
from secateur.nn._counterpart import shape_as_matrix as shape_as_matrix
from secateur.nn._counterpart import why_no_counterpart as why_no_counterpart
from secateur.nn._mask_settings import MaskSettings as MaskSettings
from secateur.nn._packed import PackedConv1D as PackedConv1D
from secateur.nn._packed import PackedLinear as PackedLinear
from secateur.nn._packed_conv import PackedConv1d as PackedConv1d
from secateur.nn._packed_conv import PackedConv2d as PackedConv2d
from secateur.nn._packed_matrix import PackedMatrix as PackedMatrix
from secateur.nn._packed_recurrent import PackedRecurrent as PackedRecurrent
from secateur.nn._packed_recurrent import packed_recurrents as packed_recurrents
from secateur.nn._packed_stack import PackedStack as PackedStack
from secateur.nn._packed_stack import packed_stacks as packed_stacks
from secateur.nn._packed_stack import put_in_place_ as put_in_place_
from secateur.nn._packed_weight import PackedWeight as PackedWeight
from secateur.nn._sparse import SparseConv2d as SparseConv2d
from secateur.nn._sparse import SparseLinear as SparseLinear
from secateur.nn._sparse_conv1d import SparseConv1D as SparseConv1D
from secateur.nn._sparse_layer import SparseLayer as SparseLayer
from secateur.nn._sparsify import densify_ as densify_
from secateur.nn._sparsify import replaceable_layers as replaceable_layers
from secateur.nn._sparsify import sparse_layers as sparse_layers
from secateur.nn._sparsify import sparsify_ as sparsify_
