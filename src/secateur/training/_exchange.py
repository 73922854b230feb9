"""Exchange of kept for pruned units: as many come as go, and the mask stays legal."""

from __future__ import annotations

import math

import torch

from secateur._errors import PatternError
from secateur._types import Mask, Scores, Weight
from secateur.patterns import SparsityPattern, check_independent, keep_top, kth_smallest
from secateur.training._weights import magnitudes


@torch.no_grad()
def exchange(
    pattern: SparsityPattern, mask: Mask, weight: Weight, growth: Scores, fraction: float, *, regrow_dropped: bool
) -> Mask:
    """Drop a fraction of the kept units, the smallest, and keep as many others, those of highest growth score.

    ``round(fraction * kept)`` units of the layer are exchanged, each within its own competition (layer, row or N:M
    group), so that the mask stays legal and exact. All competitions exchange the same number; where that is no whole
    number, those in which the next smallest unit is smallest exchange one more.

    Args:
        pattern: of the mask.
        mask: ``[out, in]``.
        weight: ``[out, in]``; units of small magnitude go.
        growth: ``[out, in]``, not negative; units of high score come.
        fraction: part of the kept units to exchange.
        regrow_dropped: let units that were just dropped come back at once. They do in any case where there are too few
            others.

    Raises:
        PatternError: weights that are NaN, or a pattern whose competitions depend on one another.
    """
    check_independent(pattern, "an exchange of weights")
    if weight.isnan().any():
        raise PatternError(f"{int(weight.isnan().sum())} of its {weight.numel()} weights are NaN.")
    units = pattern.units(mask.shape)
    kept = units.elements(units.crop(mask))[..., 0]
    if not kept.numel():
        return mask
    count = int(kept[0].count_nonzero())
    moving, more = divmod(round(fraction * count * len(kept)), len(kept))
    scores = units.scores(magnitudes(weight))
    gains = units.scores(growth.to(scores.dtype))

    def exchanged(moving: int) -> Mask:
        staying = keep_top(torch.where(kept, scores, -math.inf), count - moving)
        enough_others = kept.shape[1] - count >= moving
        candidates = ~kept if enough_others and not regrow_dropped else ~staying
        return staying | keep_top(torch.where(candidates, gains, -math.inf), moving)

    keep = exchanged(moving)
    if more:
        next_smallest = kth_smallest(torch.where(kept, scores, math.inf), moving + 1)
        keep = torch.where(keep_top(-next_smallest.view(1, -1), more).view(-1, 1), exchanged(moving + 1), keep)
    return units.mask(keep)
