"""How does a pruned or shrunk model get its accuracy back?"""

from secateur.recovery._batchnorm import Reestimated as Reestimated
from secateur.recovery._batchnorm import reestimate_ as reestimate_
