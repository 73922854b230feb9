"""How does a model become physically smaller, and still the same function?"""

from secateur.shrinking._blocks import find_blocks as find_blocks
from secateur.shrinking._experts import find_experts as find_experts
from secateur.shrinking._proof import Proof as Proof
from secateur.shrinking._proof import prove as prove
from secateur.shrinking._removal import Removal as Removal
from secateur.shrinking._remove import Undo as Undo
from secateur.shrinking._remove import remove_ as remove_
from secateur.shrinking._units import KINDS as KINDS
from secateur.shrinking._units import Boundary as Boundary
from secateur.shrinking._units import Dimension as Dimension
from secateur.shrinking._units import Graph as Graph
from secateur.shrinking._units import Kind as Kind
from secateur.shrinking._units import Place as Place
