"""How are units taken out of a model, and is it still the same function?"""

from secateur.surgery._calls import Difference as Difference
from secateur.surgery._calls import Looks as Looks
from secateur.surgery._calls import difference as difference
from secateur.surgery._calls import outputs_of as outputs_of
from secateur.surgery._calls import tolerance_for as tolerance_for
from secateur.surgery._calls import wide_outputs as wide_outputs
from secateur.surgery._proof import Proof as Proof
from secateur.surgery._proof import prove as prove
from secateur.surgery._remove import Undo as Undo
from secateur.surgery._remove import remove_ as remove_
from secateur.surgery._saved import Saved as Saved
from secateur.surgery._try import tried as tried
from secateur.surgery._try import zero_ as zero_
