"""How do other engines run a model that was exported for them?"""

from secateur.engines._engine import ENGINES as ENGINES
from secateur.engines._engine import Engine as Engine
from secateur.engines._engine import Session as Session
from secateur.engines._engine import engine_for as engine_for
from secateur.engines._library import DOMAIN as DOMAIN
from secateur.engines._library import library as library
from secateur.engines._model import Default as Default
from secateur.engines._model import EngineModel as EngineModel
from secateur.engines._openvino import import_openvino as import_openvino
