"""Layers: those that learn their mask, and how a model's layers are swapped for them."""

from secateur.nn._sparse import SparseConv2d as SparseConv2d
from secateur.nn._sparse import SparseLinear as SparseLinear
from secateur.nn._sparsify import densify_ as densify_
from secateur.nn._sparsify import sparsify_ as sparsify_
