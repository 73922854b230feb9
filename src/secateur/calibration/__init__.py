"""What do the inputs of each layer look like?"""

from secateur.calibration._arguments import fit_arguments as fit_arguments
from secateur.calibration._batches import Forward as Forward
from secateur.calibration._batches import call_model as call_model
from secateur.calibration._batches import hash_batches as hash_batches
from secateur.calibration._batches import load_batches as load_batches
from secateur.calibration._batches import quiet as quiet
from secateur.calibration._gather import gather as gather
from secateur.calibration._observe import observe as observe
from secateur.calibration._padding import Padding as Padding
from secateur.calibration._padding import PaddingSource as PaddingSource
from secateur.calibration._padding import check_padding as check_padding
from secateur.calibration._padding import padding_by_stage as padding_by_stage
from secateur.calibration._padding_masks import parameter_names as parameter_names
from secateur.calibration._replay import RouteChanged as RouteChanged
from secateur.calibration._replay import StageSource as StageSource
from secateur.calibration._replay import replayed as replayed
from secateur.calibration._sentences import padded as padded
from secateur.calibration._sentences import split_sentences as split_sentences
from secateur.calibration._stages import forward_as as forward_as
from secateur.calibration._statistics import LayerStatistics as LayerStatistics
from secateur.calibration._statistics import Need as Need
from secateur.calibration._text import Windows as Windows
from secateur.calibration._text import batched as batched
from secateur.calibration._text import read_text as read_text
from secateur.calibration._unit_gradients import Loss as Loss
from secateur.calibration._unit_gradients import gather_gradients as gather_gradients
