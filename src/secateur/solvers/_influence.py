"""How much a block changes what flows through it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from secateur._errors import PatternError, StatisticsError


@torch.no_grad()
def influence(x: Tensor, y: Tensor, real: Tensor | None = None) -> Tensor:
    r"""Return :math:`1 - \cos(x_t, y_t)` for each token: how much a block turns it. Low = the block can go.

    The influence of a block is the mean over the tokens of all batches.

    Args:
        x: input of the block, ``[..., features]``.
        y: its output, of the same shape.
        real: bool ``[...]``, True = a real token; None if all are.

    Returns:
        float64 ``[real tokens]``, from 0 to 2. A token that the block leaves at zero has 0, and one that it makes zero,
        or that was zero, has 1.

    Raises:
        PatternError: shapes that do not fit.
        StatisticsError: values that are not finite.

    Example:
        >>> import torch
        >>> from secateur.solvers import influence
        >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> influence(x, y).tolist()
        [0.0, 1.0]

    Reference:
        Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
        arXiv:2403.03853.
    """
    if x.shape != y.shape or not x.ndim or (real is not None and real.shape != x.shape[:-1]):
        mask = "" if real is None else f" and a mask {tuple(real.shape)}"
        raise PatternError(f"a block's input {tuple(x.shape)}, its output {tuple(y.shape)}{mask} do not fit.")
    kept = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if real is None else real.to(x.device)
    x, y = x[kept].double(), y[kept].double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise StatisticsError("a block's input or output has values that are NaN or infinite.")
    # Scaled by their largest values, squares neither overflow nor vanish.
    x, y = (rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) for rows in (x, y))
    turned = 1 - functional.cosine_similarity(x, y, dim=-1)
    return torch.where((x == y).all(-1), 0.0, turned).clamp(0, 2)
