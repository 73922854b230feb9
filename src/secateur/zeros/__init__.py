"""Which weights of a model are zero, and how do they stay zero?"""

from secateur.zeros._apply import HasMasks as HasMasks
from secateur.zeros._apply import apply_masks_ as apply_masks_
from secateur.zeros._masks import masks as masks
from secateur.zeros._masks import packed_mask as packed_mask
from secateur.zeros._masks import parameter_names as parameter_names
from secateur.zeros._masks import stored_masks as stored_masks
from secateur.zeros._whole import considered_of as considered_of
from secateur.zeros._whole import weigh_skipped as weigh_skipped
from secateur.zeros._whole import weights_of as weights_of
