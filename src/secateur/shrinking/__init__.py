"""Which parts of a model go together, and how is it made smaller without them?"""

from secateur.shrinking._facts import Facts as Facts
from secateur.shrinking._resize import drop_blocks_ as drop_blocks_
from secateur.shrinking._resize import facts_of as facts_of
from secateur.shrinking._resize import forget_facts as forget_facts
from secateur.shrinking._resize import remember_facts as remember_facts
from secateur.shrinking._resize import resize_ as resize_
from secateur.shrinking._resize import structure_hash as structure_hash
