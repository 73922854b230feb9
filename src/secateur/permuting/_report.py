"""What a reordering did, as values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerGain:
    """What a mask keeps of the scores of a layer.

    Args:
        name: of the layer.
        before: share of the sum of its scores that the mask keeps in the order that was there.
        after: in the new order.
        reason: why the order of its inputs stays, or empty.
    """

    name: str
    before: float
    after: float
    reason: str = ""


@dataclass(frozen=True)
class Permuted:
    """Units that have a common order.

    Args:
        name: where they are, such as ``"layers.0.mlp.ffn"``.
        kind: ``"ffn"``, ``"channels"``, ``"hidden"`` (the residual stream) or ``"values"`` (inside of heads).
        units: how many there are.
        orders: how many orders: one for each key/value head, else 1.
        layers: that read them and count.
        moved: units that have another place now.
        reason: why the order stays, or empty.
    """

    name: str
    kind: str
    units: int
    orders: int
    layers: tuple[str, ...]
    moved: int
    reason: str = ""


@dataclass(frozen=True)
class PermutationReport:
    """What :func:`secateur.permute_` did.

    Args:
        pattern: for which the order was sought, as text.
        importance: that gave the scores, as text.
        dimensions: units that have a common order.
        layers: what the mask keeps of each layer.
        error: difference of the model's outputs before and after, as a part of their norm.
        tolerance: that was allowed.
        dtype: in which the outputs were computed, ``"float64"`` or ``"float32"``.
        seconds: that it took.

    Example:
        >>> import secateur
        >>> gain = secateur.permuting.LayerGain("down", before=0.75, after=0.8)
        >>> secateur.PermutationReport("2:4", "wanda", (), (gain,), 1e-15, 1e-5, "float64", 0.5).after
        0.8
    """

    pattern: str
    importance: str
    dimensions: tuple[Permuted, ...]
    layers: tuple[LayerGain, ...]
    error: float
    tolerance: float
    dtype: str
    seconds: float

    @property
    def before(self) -> float:
        """Mean over the layers of the share that was kept."""
        return sum(layer.before for layer in self.layers) / max(1, len(self.layers))

    @property
    def after(self) -> float:
        """Mean over the layers of the share that is kept now."""
        return sum(layer.after for layer in self.layers) / max(1, len(self.layers))

    def __str__(self) -> str:
        changed = sum(layer.after > layer.before for layer in self.layers)
        lost = 1 - self.before
        less = f", {(self.after - self.before) / lost:.1%} less is lost" if lost > 0 else ""
        return (
            f"reordered the inputs of {changed} of {len(self.layers)} layers: {self.pattern} keeps {self.after:.2%} of "
            f"the {self.importance} scores, before {self.before:.2%}{less}; outputs differ by {self.error:.1e} in "
            f"{self.dtype}, {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        return asdict(self) | {"before": self.before, "after": self.after}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict())
