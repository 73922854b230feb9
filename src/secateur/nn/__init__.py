"""Layers: those that learn their mask, those that run packed, and how a model's layers are swapped for them."""

from secateur.nn._mask_settings import MaskSettings as MaskSettings
from secateur.nn._packed import PackedConv2d as PackedConv2d
from secateur.nn._packed import PackedLinear as PackedLinear
from secateur.nn._packed import pack_weight as pack_weight
from secateur.nn._sparse import SparseConv2d as SparseConv2d
from secateur.nn._sparse import SparseLinear as SparseLinear
from secateur.nn._sparse_layer import SparseLayer as SparseLayer
from secateur.nn._sparsify import densify_ as densify_
from secateur.nn._sparsify import replaceable_layers as replaceable_layers
from secateur.nn._sparsify import sparse_layers as sparse_layers
from secateur.nn._sparsify import sparsify_ as sparsify_
