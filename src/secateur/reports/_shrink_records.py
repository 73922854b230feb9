"""What a report of shrinking is made of: one frozen value for each dimension, boundary and figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShrunkDimension:
    """What happened to the units of one dimension.

    Args:
        name: of the dimension, such as ``"encoder.layer.0.ffn"``; for ``layers``, of the list of blocks.
        kind: of its units: ``layers``, ``heads``, ``query_heads``, ``ffn``, ``channels``, ``experts`` or ``hidden``.
        before: units that it had.
        after: units that it has now.
        removed: numbers of the units that went, ascending, counted from 0 in the model before.
        score: part of the sum of all scores that the removed units had, 0 to 1; None if units were not scored.
        error_without: ``norm(y - y') / norm(y)`` over all calibration tokens, without compensation: y and y' are what
            the layers that read the units give before and after. For ``layers``, of the output of the last block. None
            if it was not measured.
        error: the same with compensation.
        notes: what a user should know.
    """

    name: str
    kind: str
    before: int
    after: int
    removed: tuple[int, ...] = ()
    score: float | None = None
    error_without: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the units that stayed, ascending: unit ``i`` of the smaller model was unit ``kept[i]``."""
        gone = frozenset(self.removed)
        return tuple(unit for unit in range(self.before) if unit not in gone)


@dataclass(frozen=True)
class Boundary:
    """A dimension of a tensor that cannot be made smaller, and why.

    Args:
        tensor: qualified name of the parameter.
        dim: of the tensor.
        size: of that dimension.
        operation: the ATen operation that blocks it, or empty.
        reason: in words.
    """

    tensor: str
    dim: int
    size: int
    operation: str
    reason: str


@dataclass(frozen=True)
class ModelSize:
    """How large a whole model is.

    Args:
        parameters: numbers in all parameters, each shared one counted once.
        nbytes: bytes of all parameters and buffers, each shared one counted once.
        macs: multiply-adds of matrix products, convolutions and attention in one forward pass on the first batch; None
            if they were not counted.
        shape: of the first tensor of that batch.
        uncounted: operations of that pass that multiply but are not counted, such as those of fast recurrent layers.
    """

    parameters: int
    nbytes: int
    macs: int | None = None
    shape: tuple[int, ...] = ()
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShrinkProof:
    """How well the smaller model equals the model of full size with zeros in place of the removed units.

    Args:
        error: ``norm(difference) / norm(output)`` over all output tensors of the batches.
        tolerance: the error up to which the model was kept.
        dtype: in which both were computed, such as ``"float32"``.
        note: how it was done, where that is not by running both models as they are.
    """

    error: float
    tolerance: float
    dtype: str
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """Measured time of a forward pass, the dense and the smaller model in turn.

    Args:
        shape: of the first tensor of the input.
        before: seconds of the dense model, the median.
        after: seconds of the smaller model, the median.
        ratio: how many times as fast it is: the median of pairs measured in turn.
        low: lower quartile of those pairs.
        high: upper quartile.
        dtype: of the models.
        machine: what the measurement holds for.
    """

    shape: tuple[int, ...]
    before: float
    after: float
    ratio: float
    low: float
    high: float
    dtype: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RemovableDimension:
    """Units of one kind at one place of a model, of which any may be removed.

    Args:
        name: of the dimension.
        kind: of its units.
        units: how many there are.
        parameters: that one unit has, in all tensors that get smaller; of blocks that differ, the mean.
        group_size: units in a row of which the same number must go from each such group; 0 if any may go.
        notes: what a user should know.
    """

    name: str
    kind: str
    units: int
    parameters: int
    group_size: int = 0
    notes: tuple[str, ...] = ()
