"""Which layers are faster packed, and how is a packed model stored?"""

from secateur.packing._bench import BENCH_UNIT as BENCH_UNIT
from secateur.packing._bench import bench_dict as bench_dict
from secateur.packing._bench import bench_directory as bench_directory
from secateur.packing._bench import bench_page as bench_page
from secateur.packing._bench import bench_tables as bench_tables
from secateur.packing._bench import bench_weight as bench_weight
from secateur.packing._bench import made_weight as made_weight
from secateur.packing._compressed_tensors import read_compressed_tensors as read_compressed_tensors
from secateur.packing._decide import Decision as Decision
from secateur.packing._decide import decide as decide
from secateur.packing._directory import REPORT as REPORT
from secateur.packing._directory import export_directory as export_directory
from secateur.packing._directory import pack_directory as pack_directory
from secateur.packing._file import PackedFile as PackedFile
from secateur.packing._file import read_packed as read_packed
from secateur.packing._file import write_packed as write_packed
from secateur.packing._inspect import inspect_stored as inspect_stored
from secateur.packing._measure import Measurement as Measurement
from secateur.packing._measure import cache_at as cache_at
from secateur.packing._measure import measure as measure
from secateur.packing._model import FILE as FILE
from secateur.packing._model import load as load
from secateur.packing._model import save as save
from secateur.packing._pack import pack_ as pack_
from secateur.packing._pack import unpack_ as unpack_
from secateur.packing._settings import PackSettings as PackSettings
