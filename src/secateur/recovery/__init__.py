"""How does a pruned or shrunk model get its accuracy back?"""

from secateur.recovery._batchnorm import Reestimated as Reestimated
from secateur.recovery._batchnorm import reestimate_ as reestimate_
from secateur.recovery._directory import recover_directory as recover_directory
from secateur.recovery._directory_text import LearningText as LearningText
from secateur.recovery._recover import recover_ as recover_
from secateur.recovery._settings import LOSSES as LOSSES
from secateur.recovery._settings import METHODS as METHODS
from secateur.recovery._settings import RecoverySettings as RecoverySettings
from secateur.recovery._zeros import rounded_like as rounded_like
