"""Which parts of a model go together, and how is it made smaller without them?"""

from secateur.shrinking._analysis import blocked as blocked
from secateur.shrinking._analysis import describe as describe
from secateur.shrinking._directory import METHOD as METHOD
from secateur.shrinking._directory import analyze_directory as analyze_directory
from secateur.shrinking._directory import shrink_directory as shrink_directory
from secateur.shrinking._latency import compare_latency as compare_latency
from secateur.shrinking._removal import Removal as Removal
from secateur.shrinking._removal import check_units as check_units
from secateur.shrinking._removal import hash_model as hash_model
from secateur.shrinking._request import check_request as check_request
from secateur.shrinking._shrink import analyze as analyze
from secateur.shrinking._shrink import shrink_ as shrink_
from secateur.shrinking._size import first_shape as first_shape
from secateur.shrinking._size import model_size as model_size
from secateur.shrinking._units import KINDS as KINDS
from secateur.shrinking._units import Boundary as Boundary
from secateur.shrinking._units import Dimension as Dimension
from secateur.shrinking._units import Graph as Graph
from secateur.shrinking._units import Kind as Kind
from secateur.shrinking._units import Place as Place
