"""How does a model directory become a model, and text its input?"""

from secateur._types import Progress as Progress
from secateur.huggingface._example import example_inputs as example_inputs
from secateur.huggingface._loading import check_head as check_head
from secateur.huggingface._loading import is_causal as is_causal
from secateur.huggingface._loading import load_body as load_body
from secateur.huggingface._loading import load_model as load_model
from secateur.huggingface._loading import load_tokenizer as load_tokenizer
from secateur.huggingface._loading import model_class as model_class
from secateur.huggingface._loading import model_without_weights as model_without_weights
from secateur.huggingface._loading import open_model as open_model
from secateur.huggingface._loading import skeleton as skeleton
from secateur.huggingface._loading import transformers_library as transformers_library
from secateur.huggingface._plausible import check_counts as check_counts
from secateur.huggingface._plausible import check_size as check_size
from secateur.huggingface._pooling import pooling_of as pooling_of
from secateur.huggingface._pooling import sentence_length as sentence_length
from secateur.huggingface._reading import directory_figures as directory_figures
from secateur.huggingface._reading import directory_without_weights as directory_without_weights
from secateur.huggingface._reading import is_measured_as_causal as is_measured_as_causal
from secateur.huggingface._reading import reading_of as reading_of
from secateur.huggingface._skeletons import Changed as Changed
from secateur.huggingface._skeletons import change_skeletons as change_skeletons
from secateur.huggingface._skeletons import guard_ as guard_
from secateur.huggingface._stored import StoredWeights as StoredWeights
from secateur.huggingface._text import CalibrationText as CalibrationText
from secateur.huggingface._text import TextReader as TextReader
