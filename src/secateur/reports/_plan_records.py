"""One way to reach a target, and what happens to each part of a model on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._checked import checked


@dataclass(frozen=True)
class PlannedPart:
    """What happens to one part of a model: a block, or channels between blocks.

    Args:
        name: such as ``"encoder.layer.3"``.
        is_removed: whether the whole block goes.
        kept: for each kind of units in it, how many stay and how many there were, such as ``{"ffn": (768, 1536)}``.
        pattern: of the zeros in its layers, such as ``"block:1x4"``; empty for none.
        sparsity: of those layers.
        loss: what this does to the model by itself, by the measure of the plan; 0 for what stays as it is.
        saved: part of the dense model's time that it saves, 0 to 1, where that is most.
    """

    name: str
    is_removed: bool = False
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pattern: str = ""
    sparsity: float = 0.0
    loss: float = 0.0
    saved: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the part as a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> PlannedPart:
        """Return the part that :meth:`to_dict` wrote."""
        kept = {name: (int(stay), int(of)) for name, (stay, of) in table["kept"].items()}
        return checked(cls(**{**table, "kept": kept}))


@dataclass(frozen=True)
class PlanPoint:
    """One model in one engine: what it costs, and what it loses.

    Args:
        title: what it is, such as ``"3 of 6 layers, 70 % of ffn"`` or ``"dense"``.
        way: that runs it, by its name in :func:`secateur.compare`, such as ``"onnx-int8"``.
        milliseconds: at each shape.
        times: how many times as fast as the dense model in PyTorch, at each shape.
        nbytes: of the weights on the disk.
        parameters: of the model.
        loss: what it loses, by the measure of the plan before recovery; None if that is not known.
        figure: how good it is as measured, by the metric of the plan; None if it was not measured.
    """

    title: str
    way: str
    milliseconds: tuple[float, ...]
    times: tuple[float, ...]
    nbytes: int
    parameters: int
    loss: float | None = None
    figure: float | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model in PyTorch, at the shape where that is least."""
        return min(self.times)

    def to_dict(self) -> dict[str, Any]:
        """Return the point as a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> PlanPoint:
        """Return the point that :meth:`to_dict` wrote."""
        given = {**table, "milliseconds": tuple(table["milliseconds"]), "times": tuple(table["times"])}
        return checked(cls(**given))
