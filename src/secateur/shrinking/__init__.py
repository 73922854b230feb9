"""Which units go, and what makes up for them?"""

from secateur.graph import Removal as Removal
from secateur.shrinking._analysis import describe as describe
from secateur.shrinking._choose import kept_count as kept_count
from secateur.shrinking._choose import lowest as lowest
from secateur.shrinking._consumers import Consumer as Consumer
from secateur.shrinking._consumers import find_consumers as find_consumers
from secateur.shrinking._directory import METHOD as METHOD
from secateur.shrinking._directory import analyze_directory as analyze_directory
from secateur.shrinking._directory import chosen_method as chosen_method
from secateur.shrinking._directory import shrink_directory as shrink_directory
from secateur.shrinking._history import pruned_before as pruned_before
from secateur.shrinking._history import stages_in as stages_in
from secateur.shrinking._latency import compare_latency as compare_latency
from secateur.shrinking._levels import Level as Level
from secateur.shrinking._levels import fitted_levels as fitted_levels
from secateur.shrinking._request import check_request as check_request
from secateur.shrinking._shrink import analyze as analyze
from secateur.shrinking._shrink import shrink_ as shrink_
from secateur.shrinking._size import first_shape as first_shape
from secateur.shrinking._size import model_size as model_size
