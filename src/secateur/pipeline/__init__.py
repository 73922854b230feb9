"""Which stages make a model, and which models are good enough?"""

from secateur.pipeline._evaluate import DirectoryEvaluation as DirectoryEvaluation
from secateur.pipeline._evaluate import evaluate_directory as evaluate_directory
from secateur.pipeline._evaluate import load_to_measure as load_to_measure
from secateur.pipeline._figures import input_of as input_of
from secateur.pipeline._figures import weight_bytes as weight_bytes
from secateur.pipeline._gates import FIGURES as FIGURES
from secateur.pipeline._gates import Gate as Gate
from secateur.pipeline._pipeline import Pipeline as Pipeline
