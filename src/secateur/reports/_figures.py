"""The figures of a report that can be read off a layer, whoever pruned it."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from torch import nn

from secateur._types import Mask, Scores, Weight
from secateur.reports._records import Histogram

_BINS = 48
_THUMBNAIL = 48


def versions() -> dict[str, str]:
    """What a run needs to be repeated."""
    return {
        "secateur": metadata.version("secateur"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def histogram(scores: Scores, mask: Mask) -> Histogram | None:
    """The positive finite scores on a logarithmic axis, kept and pruned apart; None without any."""
    scores = scores.float()
    usable = (scores > 0) & scores.isfinite()
    if not usable.any():
        return None
    logs = torch.where(usable, scores, scores[usable].min()).log10()
    low, high = float(logs.min()), float(logs.max())
    high = high if high > low else low + 1
    bins = ((logs - low) / (high - low) * _BINS).long().clamp_(0, _BINS - 1)
    kept = torch.bincount(bins[mask], minlength=_BINS)
    pruned = torch.bincount(bins[~mask], minlength=_BINS)
    lowest = scores[mask].min() if mask.any() else scores.new_zeros(())
    return Histogram(
        edges=tuple(round(low + (high - low) * i / _BINS, 4) for i in range(_BINS + 1)),
        kept=tuple(kept.tolist()),
        pruned=tuple(pruned.tolist()),
        cut=round(float(lowest.log10()), 4) if lowest > 0 and lowest.isfinite() else None,
    )


def empty_rows(matrix: Weight) -> int:
    """How many rows of a matrix ``[out, in]`` are entirely zero; none where there are no columns."""
    return len(matrix) - int(matrix.ne(0).any(1).count_nonzero()) if matrix.shape[1] else 0


def thumbnail(mask: Mask) -> tuple[tuple[int, ...], ...]:
    """A picture of the mask, at most 48 x 48, rows of percent kept."""
    if not mask.numel():
        return ()
    size = (min(_THUMBNAIL, mask.shape[0]), min(_THUMBNAIL, mask.shape[1]))
    picture = nn.functional.adaptive_avg_pool2d(mask[None, None].float(), size)[0, 0]
    return tuple(tuple(row) for row in (picture * 100).round().int().tolist())
