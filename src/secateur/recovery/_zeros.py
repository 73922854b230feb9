"""Zeros that stay: what is zero in a matrix when training begins is zero when it ends, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HeldZeros:
    """The zeros of some parameters with two or more dimensions.

    Norms and biases are left out: there a zero is a value like any other.

    Args:
        parameters: as they are before training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in parameters:
            if parameter.ndim > 1 and parameter.is_floating_point():
                zeros = parameter.detach() == 0
                if bool(zeros.any()):
                    self._zeros.append((parameter, zeros))

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(int(zeros.sum()) for _, zeros in self._zeros)

    def mask_gradients_(self) -> None:
        """Take the gradients of zeros away, before clipping and before the optimizer sees them."""
        for parameter, zeros in self._zeros:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zeros, 0)

    @torch.no_grad()
    def hold_(self) -> None:
        """Set them to zero again, wherever an optimizer or weight decay may have moved them."""
        for parameter, zeros in self._zeros:
            parameter.masked_fill_(zeros, 0)


@contextmanager
def widened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hold parameters of 16 bits in float32 for a while.

    Then they get their own precision back. A weight that was not zero and would be rounded to zero keeps the value that
    it had before, so that the zeros stay the same.
    """
    narrow = [p for p in parameters if p.is_floating_point() and p.element_size() < 4]
    before = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.to(torch.float32)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(narrow, before, strict=True):
                rounded = rounded_like(parameter.data, old)
                parameter.data = old
                parameter.copy_(rounded)  # PyTorch counts this change of the tensor, and others ask for it


@contextmanager
def no_new_zeros(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give kept weights that end at exactly zero the smallest number there is: a zero would count as pruned."""
    matrices = [p for p in parameters if p.ndim > 1 and p.is_floating_point()]
    zeros = [parameter.detach() == 0 for parameter in matrices]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(matrices, zeros, strict=True):
                parameter.masked_fill_((parameter == 0) & ~old, torch.finfo(parameter.dtype).tiny)


def zeros_of(model: nn.Module) -> int:
    """Return how many weights in the matrices of a model are zero. Norms and biases do not count."""
    return sum(int((p.detach() == 0).sum()) for p in model.parameters() if p.ndim > 1 and p.is_floating_point())


def rounded_like(tensor: Tensor, old: Tensor) -> Tensor:
    """Return a tensor in the dtype of an old one, with the old value where a new zero would be.

    Args:
        tensor: new values.
        old: the values before, in the dtype to round to. In a matrix no zero is added; a vector is only rounded.
    """
    found = tensor.to(old.dtype)
    return torch.where((found == 0) & (old != 0), old, found) if old.ndim > 1 else found
