"""Which units of which dimensions go: a value that can be written to a file and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Removal:
    """Units to remove, by dimension.

    Args:
        units: by the name of a dimension, the numbers of the units that go, ascending. For ``layers``, of blocks.
        model_hash: SHA-256 of the names, shapes and dtypes of the tensors of the model that this was made for.
    """

    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    model_hash: str = ""
