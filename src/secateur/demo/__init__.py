"""The language model that comes with secateur, and what is shown with it."""

from secateur.demo._demo import HELDOUT_WINDOWS as HELDOUT_WINDOWS
from secateur.demo._demo import LENGTH as LENGTH
from secateur.demo._demo import METHODS as METHODS
from secateur.demo._demo import TARGETS as TARGETS
from secateur.demo._demo import DemoModel as DemoModel
from secateur.demo._demo import packed_runs_table as packed_runs_table
from secateur.demo._demo import run as run
from secateur.demo._demo import run_packed as run_packed
