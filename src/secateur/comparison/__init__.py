"""Which of all ways to run a model on this machine is best?"""

from secateur.comparison._compare import compare as compare
from secateur.comparison._directory import SHAPES as SHAPES
from secateur.comparison._directory import compare_directory as compare_directory
from secateur.comparison._modules import ModuleSubject as ModuleSubject
from secateur.comparison._modules import by_shape as by_shape
from secateur.comparison._modules import usual as usual
from secateur.comparison._open import open_deployed as open_deployed
from secateur.comparison._run import engine_versions as engine_versions
from secateur.comparison._run import use_threads as use_threads
from secateur.comparison._ways import WAYS as WAYS
from secateur.comparison._ways import Way as Way
