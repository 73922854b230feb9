"""How good is a model still?"""

from secateur.evaluation._before_after import DenseQuality as DenseQuality
from secateur.evaluation._pooling import POOLING_MODES as POOLING_MODES
from secateur.evaluation._pooling import Pooling as Pooling
from secateur.evaluation._quality import outputs as outputs
from secateur.evaluation._quality import perplexity as perplexity
from secateur.evaluation._quality import similarity as similarity
