"""Square tiles with the same number of kept weights in every row and every column, of the largest sum."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

_ENUMERATED = 4  # up to this size, all masks of a tile are compared: 90 of them for 2:4
_CHUNK = 1 << 21  # numbers in an intermediate result
_GAIN = 1e-10  # what an exchange must gain, as a part of the largest score of a tile; below it is rounding


def keep_regular(scores: Tensor, n: int) -> Tensor:
    """Return for tiles ``[tiles, m, m]`` the mask with n kept in each row and column whose sum of scores is largest.

    It is exact. Up to ``m = 4``, all masks are compared. Above, kept and pruned weights change places along cycles of
    rows and columns until no cycle gains, which is when no other mask has a larger sum: this is a flow of minimal cost.

    Args:
        scores: NaN and -inf are not allowed. As many as possible of those that are +inf are kept, and as few as
            possible of those that are negative.
        n: kept in each row and in each column, 0 to m.
    """
    tiles, m, _ = scores.shape
    if n in (0, m) or not tiles:
        return torch.full(scores.shape, n > 0, dtype=torch.bool, device=scores.device)
    choose = _enumerated if m <= _ENUMERATED else _exchanged
    step = max(1, _CHUNK // m**3)
    return torch.cat([choose(_finite(part), n) for part in scores.split(step)])


def _finite(scores: Tensor) -> Tensor:
    """Scores in float64 between -1 and 1; the infinite ones are worth more than all others, and negative ones less.

    Only the sum of a whole tile can be large then, whatever the scores are, and only where some are infinite.
    """
    wide = scores.double()
    far = float(4 * scores.shape[1] ** 2)
    infinite = wide.isinf()
    largest = wide.masked_fill(infinite, 0).abs().amax((1, 2), keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1)
    return torch.where(infinite, far**2, torch.where(wide < 0, scaled - far, scaled))


@cache
def _masks(m: int, n: int) -> Tensor:
    """All masks of a tile with n kept in each row and column, ``[masks, m, m]`` bool."""
    rows = torch.tensor([[column in kept for column in range(m)] for kept in combinations(range(m), n)])
    chosen = torch.tensor(list(product(range(len(rows)), repeat=m)))
    found = rows[chosen]
    return found[(found.sum(1) == n).all(1)]


def _enumerated(scores: Tensor, n: int) -> Tensor:
    masks = _masks(scores.shape[1], n).to(scores.device)
    sums = scores.flatten(1) @ masks.flatten(1).double().T
    return masks[sums.argmax(1)]


def _exchanged(scores: Tensor, n: int) -> Tensor:
    tiles, m, _ = scores.shape
    steps = torch.arange(m, device=scores.device)
    start = (steps[None, :] - steps[:, None]) % m < n
    mask = start.expand(tiles, m, m).clone()
    active = torch.arange(tiles, device=scores.device)
    while len(active):
        changed = _exchange_(scores, mask, active)
        active = active[changed]
    return mask


def _exchange_(scores: Tensor, mask: Tensor, active: Tensor) -> Tensor:
    """Exchange weights along the shortest cycle that gains, in each of the active tiles. Return in which there is one.

    An edge from row i to row k keeps a weight of row i and prunes that of row k in the same column. Along a cycle of
    edges, every row and column keeps as many as before. The shortest cycle that gains passes no row twice.
    """
    kept, score = mask[active], scores[active]
    gain = torch.where(kept, -math.inf, score)[:, :, None] - torch.where(kept, score, math.inf)[:, None]
    edge, column = gain.max(3)  # [tiles, i, k]: of the best column
    m = score.shape[1]
    waiting = torch.arange(len(active), device=scores.device)
    changed = torch.zeros(len(active), dtype=torch.bool, device=scores.device)
    walks = [edge]  # of 1, 2, ... edges
    for _ in range(2, m + 1):
        own = edge[waiting]
        walks.append((walks[-1][:, :, :, None] + own[:, None]).amax(2))
        best, first = walks[-1].diagonal(dim1=1, dim2=2).max(1)
        gains = best > _GAIN
        if gains.any():
            here = gains.nonzero().flatten()
            where = waiting[here]
            row, last = first[here], first[here]
            for walk in reversed(walks[:-1]):
                previous = (walk[here, row] + own[here, :, last]).argmax(1)
                _flip_(mask, active[where], previous, last, column[where, previous, last])
                last = previous
            _flip_(mask, active[where], row, last, column[where, row, last])
            changed[where] = True
        if gains.all():
            break
        waiting, walks = waiting[~gains], [walk[~gains] for walk in walks]
    return changed


def _flip_(mask: Tensor, tiles: Tensor, gaining: Tensor, losing: Tensor, columns: Tensor) -> None:
    mask[tiles, gaining, columns] = True
    mask[tiles, losing, columns] = False
