"""Which modules have a weight matrix, how is it read, and may a module be replaced?"""

from secateur._sharding import full_tensor as full_tensor
from secateur._sharding import is_sharded as is_sharded
from secateur._sharding import local_part as local_part
from secateur._sharding import reshard as reshard
from secateur._sharding import sharded_like as sharded_like
from secateur._sharding import sharded_modules as sharded_modules
from secateur._sharding import write_whole_ as write_whole_
from secateur.layers._kind import LayerKind as LayerKind
from secateur.layers._kinds import FLATTENED as FLATTENED
from secateur.layers._kinds import is_transposed_linear as is_transposed_linear
from secateur.layers._kinds import kind_of as kind_of
from secateur.layers._kinds import kinds_of as kinds_of
from secateur.layers._kinds import register_layer as register_layer
from secateur.layers._models import check_model as check_model
from secateur.layers._models import computed_by as computed_by
from secateur.layers._observed import NEVER_REACHED as NEVER_REACHED
from secateur.layers._observed import Observed as Observed
from secateur.layers._observed import Reading as Reading
from secateur.layers._optimizer import clear_state_ as clear_state_
from secateur.layers._replace import Replaceability as Replaceability
from secateur.layers._replace import swap_modules_ as swap_modules_
from secateur.layers._select import Layer as Layer
from secateur.layers._select import globs_of as globs_of
from secateur.layers._select import select_layers as select_layers
