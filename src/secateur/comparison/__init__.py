"""Which of all ways to run a model on this machine is best?"""

from secateur.comparison._compare import compare as compare
from secateur.comparison._directory import SHAPES as SHAPES
from secateur.comparison._directory import compare_directory as compare_directory
from secateur.comparison._ways import WAYS as WAYS
from secateur.comparison._ways import Way as Way
