"""How the kernel of a convolution moves over an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Pair(NamedTuple):
    """A number for each of the two dimensions of an image."""

    down: int
    across: int


_ONE, _NONE = Pair(1, 1), Pair(0, 0)


@dataclass(frozen=True)
class Window:
    """How the kernel of a convolution without groups moves over an image. Its padding has zeros.

    Args:
        kernel: its positions.
        stride: pixels from one output to the next.
        padding: pixels added on each side.
        dilation: pixels from one position of the kernel to the next.
    """

    kernel: Pair = _ONE
    stride: Pair = _ONE
    padding: Pair = _NONE
    dilation: Pair = _ONE

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Window:
        """Return the window of these eight numbers. This is the inverse of :attr:`numbers`."""
        pairs = [Pair(numbers[at], numbers[at + 1]) for at in range(0, 8, 2)]
        return cls(*pairs)

    @property
    def numbers(self) -> list[int]:
        """Eight numbers, as operators take them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    @property
    def pairs(self) -> tuple[Pair, Pair, Pair, Pair]:
        """Stride, kernel, padding and dilation: the order of arguments of packed convolutions."""
        return self.stride, self.kernel, self.padding, self.dilation

    @property
    def positions(self) -> int:
        """How many positions the kernel has."""
        return math.prod(self.kernel)

    @property
    def picks_pixels(self) -> bool:
        """Whether each output reads one pixel."""
        return self.positions == 1 and not any(self.padding)

    def outputs(self, height: int, width: int) -> Pair:
        """Return how many pixels the output has in each dimension: fewer than 1 if the image is too small."""
        found = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return Pair(*found)

    def rows(self, x: Tensor) -> Tensor:
        """Return what each output reads, ``[images * down * across, channels * positions]``.

        Args:
            x: ``[images, channels, height, width]``.
        """
        if self.picks_pixels:
            return x[:, :, :: self.stride.down, :: self.stride.across].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        unfolded = nn.functional.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
