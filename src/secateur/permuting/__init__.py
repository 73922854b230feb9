"""In which order do layers read their inputs, so that an N:M mask keeps most, and is it still the same function?"""

from secateur.permuting._permute import permute_ as permute_
from secateur.permuting._permute import permute_for as permute_for
from secateur.permuting._report import LayerGain as LayerGain
from secateur.permuting._report import PermutationReport as PermutationReport
from secateur.permuting._report import Permuted as Permuted
