"""Products of inputs with one or several packed matrices, each matrix only for the inputs that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from secateur._types import Weight
from secateur.kernels import is_intercepted


class Part(Protocol):
    """A packed matrix ``[out, in]``, such as a :class:`PackedLinear`."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + bias`` for x ``[..., in]``."""

    def matrix(self) -> Weight:
        """Return the dense matrix."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the dense matrix."""

    @property
    def weight_device(self) -> torch.device:
        """Where its tensors are."""


def joined_product(parts: Sequence[Part], x: Tensor, bias: Tensor | None = None, along: int = 0) -> Tensor:
    """Return ``x Wᵀ + bias`` for a matrix that the parts make together.

    Args:
        parts: side by side in the matrix.
        x: ``[..., in]``.
        bias: ``[out]``, or None.
        along: 0 if the rows of the parts follow on one another, 1 if their columns do.
    """
    if len(parts) == 1:
        return parts[0].product(x, bias)
    sizes = [part.matrix_shape[along] for part in parts]
    if along == 0:
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        return torch.cat([part.product(x, own) for part, own in zip(parts, biases, strict=True)], -1)
    first, *others = (part.product(own) for part, own in zip(parts, x.split(sizes, -1), strict=True))
    y = sum(others, first)
    return y if bias is None else y + bias


def stack_product(parts: Sequence[Part], x: Tensor) -> Tensor:
    """Return ``x[i] W[i]ᵀ`` for each of several matrices.

    A matrix that is there several times gets all of its inputs at once. Inputs that are zero as a whole stand for
    tokens that were routed elsewhere: their outputs are zero without a product, unless a gradient passes.

    Args:
        parts: of one shape.
        x: ``[parts, rows, in]``.
    """
    out = parts[0].matrix_shape[0]
    places: dict[int, list[int]] = {}
    for place, part in enumerate(parts):
        places.setdefault(id(part), []).append(place)
    alive = None if _must_run(x) else x.ne(0).any(-1)
    if alive is None or bool(alive.all()):
        pieces = [parts[own[0]].product(_taken(x, own)) for own in places.values()]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        order = [place for own in places.values() for place in own]
        if order == sorted(order):
            return y
        return y.index_select(0, torch.tensor(order, device=x.device).argsort())
    y = x.new_zeros(*x.shape[:-1], out)
    counts = alive.sum(-1).tolist()
    for own in places.values():
        if not any(counts[place] for place in own):
            continue
        if len(own) == 1 and counts[own[0]] == x.shape[1]:
            y[own[0]] = parts[own[0]].product(x[own[0]])
        else:
            index = torch.tensor(own, device=x.device)
            places_alive, rows = alive[index].nonzero(as_tuple=True)
            where = index[places_alive], rows
            y[where] = parts[own[0]].product(x[where])
    return y


def grouped_product(parts: Sequence[Part], x: Tensor, ends: Tensor) -> Tensor:
    """Return the products of rows that are sorted by their matrix.

    Args:
        parts: of one shape.
        x: ``[rows, in]``.
        ends: ``[parts]``, where the rows of each matrix end. The outputs of rows beyond the last end are zero.
    """
    pieces = [
        part.product(x[begin:end])
        for part, (begin, end) in zip(parts, pairwise([0, *ends.tolist()]), strict=True)
        if end > begin
    ]
    missing = len(x) - sum(map(len, pieces))
    if missing:
        pieces.append(x.new_zeros(missing, parts[0].matrix_shape[0]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _must_run(x: Tensor) -> bool:
    """Whether a product must not depend on which inputs are zero: their gradients are not, and a trace is for all."""
    return (x.requires_grad and torch.is_grad_enabled()) or is_intercepted()


def _taken(x: Tensor, places: list[int]) -> Tensor:
    if len(places) == len(x):
        return x
    if len(places) == 1:
        return x[places[0]].unsqueeze(0)
    return x.index_select(0, torch.tensor(places, device=x.device))
