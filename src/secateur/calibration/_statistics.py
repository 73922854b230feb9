"""What a layer's inputs looked like during calibration, and the accumulator that gathers it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from secateur._errors import StatisticsError

Need: TypeAlias = Literal["input_norm", "gram"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's inputs over all calibration tokens; only what was asked for is present.

    Fields have a leading dimension for the groups of a grouped convolution, whose rows see different inputs: row r of
    ``out`` rows belongs to group ``r // (out // groups)``. For all other layers that dimension may be left out.

    Args:
        tokens: input rows seen (tokens, or output positions of a convolution).
        input_norm: ``[in]`` or ``[groups, in]``: the L2 norm of each input feature over all tokens.
        gram: ``[in, in]`` or ``[groups, in, in]``: the raw sum ``X.T @ X`` over all tokens, not their mean.
    """

    tokens: int
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    # Factorisations of the gram, by what they depend on: layers that read the same inputs share them.
    factors: dict[Hashable, tuple[Tensor, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def require(self, need: Need) -> Tensor:
        """Return the named field with its leading group dimension, or raise because it was not gathered.

        Raises:
            StatisticsError: the field is None.
        """
        value: Tensor | None = getattr(self, need)
        if value is None:
            raise StatisticsError(f"the statistic {need!r} was not gathered; list it in `needs`.")
        return value if value.ndim == (3 if need == "gram" else 2) else value.unsqueeze(0)


class Accumulator:
    """Gathers :class:`LayerStatistics` from batches of input rows, in float32 or better whatever the inputs' dtype."""

    def __init__(self, needs: Iterable[Need]) -> None:
        self._needs = frozenset(needs)
        self._tokens = 0
        self._squares: Tensor | None = None  # [groups, in] float64
        self._gram: Tensor | None = None  # [groups, in, in]
        self._result: LayerStatistics | None = None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add ``[groups, tokens, in]`` input rows.

        Raises:
            StatisticsError: an input that is NaN or infinite.
        """
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).sum())
            raise StatisticsError(
                f"{bad} of {rows.numel()} input values are NaN or infinite, so nothing can be learned from them.\n"
                "Check that the model computes finite outputs on the calibration batches in its current dtype."
            )
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        self._tokens += rows.shape[1]
        if "gram" in self._needs:
            if self._gram is None:
                self._gram = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
            for gram, group in zip(self._gram, rows, strict=True):  # mm is several times faster than bmm of one matrix
                gram.addmm_(group.T, group)
        elif "input_norm" in self._needs:
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
            self._squares = squares if self._squares is None else self._squares + squares

    def merge(self, other: Accumulator) -> None:
        """Add what another one with the same needs has gathered."""
        self._tokens += other._tokens
        for name in ("_squares", "_gram"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs.clone() if mine is None else mine.add_(theirs))

    def copy(self) -> Accumulator:
        """Return an independent accumulator that has gathered the same."""
        duplicate = Accumulator(self._needs)
        duplicate.merge(self)
        return duplicate

    def result(self) -> LayerStatistics:
        """Return what was gathered; nothing may be added afterwards, and asking again returns the same object.

        Raises:
            StatisticsError: no input row was ever added, or products of inputs overflow.
        """
        if self._result is None:
            if not self._tokens:
                raise StatisticsError("no calibration input ever reached it.")
            if self._gram is not None:
                self._squares = self._gram.diagonal(dim1=1, dim2=2).double()
            if self._squares is not None and not self._squares.isfinite().all():
                raise StatisticsError("its inputs are so large that their products overflow float32. Scale them down.")
            norm = None
            if "input_norm" in self._needs:
                assert self._squares is not None
                norm = self._squares.sqrt().to(torch.float32)
            self._result = LayerStatistics(tokens=self._tokens, input_norm=norm, gram=self._gram)
        return self._result
