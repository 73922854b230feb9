"""How does a model directory become a model, and text its input?"""

from secateur.huggingface._models import CalibrationText as CalibrationText
from secateur.huggingface._models import Progress as Progress
from secateur.huggingface._models import load_model as load_model
from secateur.huggingface._models import load_tokenizer as load_tokenizer
from secateur.huggingface._models import model_class as model_class
from secateur.huggingface._models import prune_directory as prune_directory
from secateur.huggingface._models import transformers_library as transformers_library
