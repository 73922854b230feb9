"""Which stages make a model, and which models are good enough?"""

from secateur.pipeline._gates import FIGURES as FIGURES
from secateur.pipeline._gates import Gate as Gate
