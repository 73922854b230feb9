"""Which modules hold a weight matrix, how is it read, and may the module be replaced?"""

from secateur.layers._layers import Layer as Layer
from secateur.layers._layers import LayerKind as LayerKind
from secateur.layers._layers import Skipped as Skipped
from secateur.layers._layers import full_tensor as full_tensor
from secateur.layers._layers import kind_of as kind_of
from secateur.layers._layers import register_layer as register_layer
from secateur.layers._layers import select_layers as select_layers
from secateur.layers._replace import swap_modules_ as swap_modules_
from secateur.layers._sharding import clear_state_ as clear_state_
from secateur.layers._sharding import local_part as local_part
from secateur.layers._sharding import sharded_like as sharded_like
