"""Which sizes does a model have that became smaller, and how is it stored and loaded?"""

from secateur.shapes._claim import prefix_of as prefix_of
from secateur.shapes._claim import resize_any_ as resize_any_
from secateur.shapes._facts import Facts as Facts
from secateur.shapes._resize import drop_blocks_ as drop_blocks_
from secateur.shapes._resize import facts_of as facts_of
from secateur.shapes._resize import forget_facts as forget_facts
from secateur.shapes._resize import has_sizes as has_sizes
from secateur.shapes._resize import known_facts as known_facts
from secateur.shapes._resize import left_children as left_children
from secateur.shapes._resize import remember_facts as remember_facts
from secateur.shapes._resize import resize_ as resize_
from secateur.shapes._resize import structure_hash as structure_hash
from secateur.shapes._shrunk_directory import config_before as config_before
from secateur.shapes._shrunk_directory import is_saved_shrunk as is_saved_shrunk
from secateur.shapes._shrunk_directory import load_shrunk as load_shrunk
from secateur.shapes._shrunk_directory import save_shrunk as save_shrunk
from secateur.shapes._shrunk_directory import shrunk_without_weights as shrunk_without_weights
from secateur.shapes._stored_dtypes import convert_ as convert_
from secateur.shapes._stored_dtypes import round_ as round_
from secateur.shapes._stored_dtypes import stored_bytes as stored_bytes
from secateur.shapes._stored_dtypes import stored_dtypes as stored_dtypes
from secateur.shapes._uniform import Uniform as Uniform
from secateur.shapes._uniform import find_uniform as find_uniform
