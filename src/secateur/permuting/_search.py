"""Search for an order of units that lets an N:M mask keep more of the scores of all matrices that read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.permuting._assign import assign

_ROWS = 16384  # of all readers together that the search looks at; what it finds is checked on all of them
_BATCH = 256  # sets of units that exchange members at a time
_CHUNK = 1 << 24  # numbers in an intermediate result


def search(readers: Sequence[Tensor], n: int, m: int, movable: int, rounds: int, seed: int) -> NDArray[np.int64]:
    """Return the order ``[units]`` in which units should be read: the unit at each place.

    Units are dealt into sets of so many that groups of m begin at the same unit of each set. The start is the better of
    the order that is there and of RIA's heuristic: sort by score, and deal in snake order. Then one member of each set
    is taken out and all are put back where they are worth most, which is a linear sum assignment, for every place of a
    set in turn. An exchange of two units between two sets is one of the assignments. No step makes the sum smaller.

    Args:
        readers: the scores of columns ``[rows, units, width]``, each of a matrix that reads the units in their order,
            from a column on that is a multiple of m.
        n: weights kept in each group.
        m: columns in a group.
        movable: units from the first on that may move; those after them stay.
        rounds: so many passes over all places of a set.
        seed: of the choice of rows, sets and members.
    """
    units = readers[0].shape[1]
    size = math.lcm(*(m // math.gcd(found.shape[2], m) for found in readers))
    count = movable // size
    order = np.arange(units)
    if size == 1 or count < 2 or n in (0, m):
        return order
    generator = np.random.default_rng(seed)
    scores = _sampled(readers, generator)
    start = order[: count * size].reshape(count, size)
    dealt = _dealt(scores, count, size)
    sets = start.copy() if _total(scores, start, n, m) >= _total(scores, dealt, n, m) else dealt
    any_order = all(found.shape[2] == 1 for found in scores)  # inside a set of one group, members may change places
    for _ in range(rounds):
        for slot in range(size):
            if any_order:
                sets = generator.permuted(sets, axis=1)
            for chosen in np.array_split(generator.permutation(count), math.ceil(count / _BATCH)):
                values = _values(scores, sets[chosen], slot, n, m)
                found = assign(values)
                if values[found, np.arange(len(found))].sum() > values.trace():
                    sets[chosen, slot] = sets[chosen[found], slot]
    if any_order:
        sets = np.sort(sets, axis=1)
        sets = sets[np.argsort(sets[:, 0])]
    order[: count * size] = sets.reshape(-1)
    return order


def _sampled(readers: Sequence[Tensor], generator: np.random.Generator) -> list[Tensor]:
    """Some rows of each reader, in float32, each reader with the weight that all of its rows have."""
    rows = sum(len(found) for found in readers)
    found = []
    for scores in readers:
        left = len(scores) if rows <= _ROWS else min(len(scores), max(64, len(scores) * _ROWS // rows))
        if left == len(scores):
            found.append(scores.float())
        else:
            chosen = torch.from_numpy(np.sort(generator.choice(len(scores), left, replace=False)))
            found.append(scores[chosen.to(scores.device)].float() * (len(scores) / left))
    return found


def _dealt(readers: Sequence[Tensor], count: int, size: int) -> NDArray[np.int64]:
    """Units sorted by their scores and dealt to sets ``[count, size]`` in snake order."""
    score = torch.stack([found[:, : count * size].double().sum((0, 2)) for found in readers]).sum(0)
    dealt = score.argsort(descending=True, stable=True).view(size, count).cpu().numpy()
    dealt[1::2] = dealt[1::2, ::-1].copy()
    return np.ascontiguousarray(dealt.T)


def _total(readers: Sequence[Tensor], sets: NDArray[np.int64], n: int, m: int) -> float:
    """The sum of the scores that are kept in all readers."""
    index = torch.from_numpy(sets.reshape(-1))
    total = 0.0
    for scores in readers:
        for part in scores.split(max(1, _CHUNK // max(1, scores[0].numel()))):
            groups = part[:, index.to(part.device)].reshape(len(part), -1, m)
            total += float(groups.topk(n, dim=2, sorted=False).values.double().sum())
    return total


def _values(readers: Sequence[Tensor], sets: NDArray[np.int64], slot: int, n: int, m: int) -> NDArray[np.float64]:
    """What each set keeps with each of the units at one place of the sets: ``[units, sets]``, up to a sum for each."""
    size = sets.shape[1]
    values = np.zeros((len(sets), len(sets)))
    for scores in readers:
        width = scores.shape[2]
        members = torch.from_numpy(sets).to(scores.device)
        for group in range(slot * width // m, ((slot + 1) * width - 1) // m + 1):
            places = range(group * m, min((group + 1) * m, size * width))
            own = torch.tensor([place % width for place in places if place // width == slot], device=scores.device)
            others = torch.tensor([place for place in places if place // width != slot], dtype=torch.int64).to(own)
            moving = scores[:, members[:, slot]].index_select(2, own)
            staying = scores[:, members[:, others // width], others % width]
            values = values + _kept(_best(moving, n), _best(staying, n), n).double().cpu().numpy()
    return values


def _best(scores: Tensor, n: int) -> list[Tensor]:
    """The sum of the 0, 1, ... n highest of the last dimension."""
    most = min(n, scores.shape[2])
    highest = scores.topk(most, dim=2).values.cumsum(2)
    return [scores.new_zeros(scores.shape[:2]), *highest.unbind(2)]


def _kept(moving: list[Tensor], staying: list[Tensor], n: int) -> Tensor:
    """The sum over rows of the n highest of two lists together, ``[moving, staying]``, from the sums of the highest."""
    splits = [(n - k, k) for k in range(len(staying)) if 0 <= n - k < len(moving)]
    if not splits:  # fewer than n in both: all are kept
        splits = [(len(moving) - 1, len(staying) - 1)]
    if len(splits) == 1:
        one, other = splits[0]
        return moving[one].sum(0)[:, None] + staying[other].sum(0)[None, :]
    if len(splits) == 2:  # max(a, b) is half of a + b + |a - b|, and sums of |a - b| are computed fast
        (more, fewer), (less, further) = splits
        a, b = moving[more] - moving[less], staying[further] - staying[fewer]
        distance = torch.cdist(a.T.contiguous(), b.T.contiguous(), p=1)
        base = moving[less].sum(0)[:, None] + staying[fewer].sum(0)[None, :]
        return base + (a.sum(0)[:, None] + b.sum(0)[None, :] + distance) / 2
    parts = []
    step = max(1, _CHUNK // max(1, staying[0].numel()))
    for begin in range(0, moving[0].shape[1], step):
        sums = [moving[one][:, begin : begin + step, None] + staying[other][:, None] for one, other in splits]
        parts.append(torch.stack(sums).amax(0).sum(0))
    return torch.cat(parts)
