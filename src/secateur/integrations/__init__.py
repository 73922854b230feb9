"""Sparse training inside other people's training loops: one module each, to be imported by name.

``secateur.integrations.transformers`` needs ``pip install 'secateur[trainer]'``, ``secateur.integrations.lightning``
needs ``pip install 'secateur[lightning]'``. Both bring a ``SparseTrainingCallback``.
"""

from secateur.integrations._shared import read_state as read_state
from secateur.integrations._shared import write_state as write_state
