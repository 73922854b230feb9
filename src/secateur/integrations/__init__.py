"""How does sparse training run inside somebody else's trainer? One module each, to be imported by name.

``secateur.integrations.transformers`` needs ``pip install 'secateur[trainer]'``, ``secateur.integrations.lightning``
needs ``pip install 'secateur[lightning]'``. Both bring a ``SparseTrainingCallback``.
"""

from secateur.integrations._shared import read_state as read_state
from secateur.integrations._shared import write_state as write_state
