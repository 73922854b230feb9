"""Layers: those that learn their mask, those that run packed, and how a model's layers are swapped for them."""

from secateur.nn._packed import PackedConv2d as PackedConv2d
from secateur.nn._packed import PackedLinear as PackedLinear
from secateur.nn._sparse import SparseConv2d as SparseConv2d
from secateur.nn._sparse import SparseLinear as SparseLinear
from secateur.nn._sparsify import densify_ as densify_
from secateur.nn._sparsify import sparsify_ as sparsify_
