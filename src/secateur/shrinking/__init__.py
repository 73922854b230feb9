"""Which parts of a model go together, and how is it made smaller without them?"""

from secateur.shrinking._removal import Removal as Removal
from secateur.shrinking._removal import check_units as check_units
from secateur.shrinking._removal import hash_model as hash_model
from secateur.shrinking._size import first_shape as first_shape
from secateur.shrinking._size import model_size as model_size
from secateur.shrinking._units import KINDS as KINDS
from secateur.shrinking._units import Boundary as Boundary
from secateur.shrinking._units import Dimension as Dimension
from secateur.shrinking._units import Graph as Graph
from secateur.shrinking._units import Kind as Kind
from secateur.shrinking._units import Place as Place
