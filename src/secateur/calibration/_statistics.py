"""What a layer's inputs looked like during calibration, as importances and solvers read it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeAlias

from torch import Tensor

from secateur._errors import StatisticsError

# Those of gradients need a loss: `gather_gradients` and `add_gradients` gather them, not `gather`.
Need: TypeAlias = Literal["input_norm", "input_mean", "gram", "input_gradients", "gradient", "gradient_squares"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's inputs over all calibration tokens; only what was asked for is present.

    Fields have a leading dimension for the groups of a grouped convolution, whose rows see different inputs: row r of
    ``out`` rows belongs to group ``r // (out // groups)``. For all other layers that dimension may be left out.

    Args:
        tokens: input rows seen (tokens, or output positions of a convolution).
        input_norm: ``[in]`` or ``[groups, in]``: the L2 norm of each input feature over all tokens.
        gram: ``[in, in]`` or ``[groups, in, in]``: the raw sum ``X.T @ X`` over all tokens, not their mean.
        own_tokens: input rows of the layer itself, where they were too few and those of its whole stack count.
        input_mean: ``[in]`` or ``[groups, in]``: the mean of each input feature over all tokens, in float64.
        input_gradients: ``[batches, in]``: the derivative of each batch's loss by a factor on each feature.
        gradient: ``[out, in]``: the mean over batches of the gradient of each batch's loss by the weight.
        gradient_squares: ``[out, in]``: the mean over batches of the squares of that gradient.
    """

    tokens: int
    input_norm: Tensor | None = field(default=None, metadata={"dimensions": 1})
    gram: Tensor | None = field(default=None, metadata={"dimensions": 2})
    own_tokens: int | None = None
    input_mean: Tensor | None = field(default=None, metadata={"dimensions": 1})
    input_gradients: Tensor | None = field(default=None, metadata={"dimensions": 2})
    gradient: Tensor | None = field(default=None, metadata={"dimensions": 2})
    gradient_squares: Tensor | None = field(default=None, metadata={"dimensions": 2})
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
        return value if value.ndim == 1 + _DIMENSIONS[need] else value.unsqueeze(0)

    def with_gradients(self, **gradients: Tensor) -> LayerStatistics:
        """Return these statistics and gradients of the weight, by field. Factorisations of the gram stay shared."""
        found = replace(self, **gradients)  # type: ignore[arg-type]
        object.__setattr__(found, "factors", self.factors)
        return found


_DIMENSIONS: dict[str, int] = {f.name: f.metadata["dimensions"] for f in fields(LayerStatistics) if f.metadata}
