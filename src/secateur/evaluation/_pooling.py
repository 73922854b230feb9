"""The states of a sentence's tokens as one vector, as the sentence-transformers library makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur._checks import flag, one_of
from secateur._errors import RecipeError, StatisticsError

# In the order in which sentence-transformers puts their results one after the other.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@dataclass(frozen=True)
class Pooling:
    """How the states of a sentence's tokens become its embedding. Padding never counts.

    With the states ``h_1 ... h_n`` of the n real tokens of a sentence:

    ======================== ================================================
    ``cls``                  ``h_1``
    ``max``                  the largest of each feature
    ``mean``                 ``sum_i h_i / n``
    ``mean_sqrt_len_tokens`` ``sum_i h_i / sqrt(n)``
    ``weightedmean``         ``sum_i i h_i / sum_i i``
    ``lasttoken``            ``h_n``
    ======================== ================================================

    Args:
        modes: one of these names or several, whose results are put one after the other.
        normalize: whether the embedding is divided by its L2 norm.

    Raises:
        RecipeError: there is no such mode, or none.

    Example:
        >>> import torch
        >>> from secateur.evaluation import Pooling
        >>> states = torch.tensor([[[1.0, 4.0], [3.0, 0.0], [9.0, 9.0]]])
        >>> Pooling(("mean",), normalize=False)(states, torch.tensor([[True, True, False]]))
        tensor([[2., 2.]])
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = True

    def __post_init__(self) -> None:
        modes = (self.modes,) if isinstance(self.modes, str) else tuple(self.modes)
        if not modes:
            raise RecipeError("a pooling needs at least one mode, such as 'mean'; got none.")
        object.__setattr__(self, "modes", tuple(one_of("pooling mode", mode, POOLING_MODES) for mode in modes))
        flag("normalize", self.normalize)

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the embedding of each sentence.

        Args:
            states: of the tokens, ``[batch, length, hidden]``.
            mask: ``[batch, length]``, True or 1 where a token is real; None if all are.

        Returns:
            ``[batch, hidden * modes]``, in float32 or better. A sentence without a real token gives zeros.

        Raises:
            StatisticsError: shapes that do not fit.
        """
        if states.ndim != 3 or (mask is not None and mask.shape != states.shape[:2]):
            given = "" if mask is None else f" with a mask {list(mask.shape)}"
            raise StatisticsError(
                f"states {list(states.shape)}{given} cannot be pooled: expected [batch, length, hidden], and a mask "
                "[batch, length]. Give the states of tokens, such as last_hidden_state."
            )
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        real = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.to(states.device).bool()
        pooled = torch.cat([_pool(mode, states, real) for mode in self.modes], dim=-1)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def _pool(mode: str, states: Tensor, real: Tensor) -> Tensor:
    """One vector for each sentence; ``real`` is ``[batch, length]``. Zeros where no token is real."""
    found = real.any(dim=1, keepdim=True)
    # What stands at padding may be anything, NaN too, and 0 * NaN is NaN.
    states = states.masked_fill(~real[..., None], -torch.inf if mode == "max" else 0.0)
    if mode == "max":
        return states.amax(dim=1).masked_fill(~found, 0.0)
    positions = real.cumsum(dim=1)  # 1 at the first real token
    if mode in ("cls", "lasttoken"):
        wanted = positions == (1 if mode == "cls" else positions[:, -1:])
        return (states * (wanted & real)[..., None]).sum(dim=1)
    weights = (positions if mode == "weightedmean" else torch.ones_like(positions)) * real
    total = weights.sum(dim=1, keepdim=True).clamp(min=1).to(states.dtype)
    summed = (states * weights[..., None]).sum(dim=1)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
