"""Is a file what it claims to be, and is what we write there whole or not there at all?"""

from secateur.files._claims import first_part as first_part
from secateur.files._claims import is_part as is_part
from secateur.files._claims import without_claims as without_claims
from secateur.files._directory import INDEX as INDEX
from secateur.files._directory import SINGLE as SINGLE
from secateur.files._directory import ModelDirectory as ModelDirectory
from secateur.files._directory import check_no_pickle as check_no_pickle
from secateur.files._directory import copy_all_but_weights as copy_all_but_weights
from secateur.files._directory import find_shards as find_shards
from secateur.files._inspect import TensorSummary as TensorSummary
from secateur.files._inspect import inspect as inspect
from secateur.files._inspect import summarize as summarize
from secateur.files._place import check_output as check_output
from secateur.files._place import check_place as check_place
from secateur.files._safetensors import open_safetensors as open_safetensors
from secateur.files._safetensors import parse_header as parse_header
from secateur.files._safetensors import read_header as read_header
from secateur.files._whole import whole_directory as whole_directory
from secateur.files._whole import write_safetensors as write_safetensors
from secateur.files._whole import write_text as write_text
