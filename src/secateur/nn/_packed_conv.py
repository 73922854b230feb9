"""Convolutions that run packed: with kernels of one position, which are linear layers on every position."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from secateur.formats import Format
from secateur.kernels import RoutePlan, check_dense
from secateur.nn._packed import PackedLinear


class PackedConvolution(nn.Module, ABC):
    """A convolution whose kernel has one position, with a packed weight: all but how many dimensions it moves in.

    The attributes are those of the dense layer. A padding of nothing has always the form of numbers.
    """

    groups, padding_mode, transposed = 1, "zeros", False

    def __init__(self, linear: PackedLinear, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = linear
        self.stride = stride
        self.kernel_size = self.dilation = (1,) * len(stride)
        self.padding = self.output_padding = (0,) * len(stride)

    @staticmethod
    def fits(module: nn.Conv1d | nn.Conv2d) -> bool:
        """Return whether a convolution is a linear layer on every position."""
        padding = (0,) if module.padding in ("valid", "same") else module.padding
        return math.prod(module.kernel_size) == 1 and not any(padding) and module.groups == 1

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a layer of the class that was packed, with the same weight and bias in new tensors."""

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.linear.in_features

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.linear.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, ``[out, in, 1, ...]``, computed at each access. For code that only reads it."""
        matrix = self.linear.weight
        return matrix.reshape(*matrix.shape, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        return self.linear.bias

    @property
    def packed(self) -> Format:
        """The weight in its storage format."""
        return self.linear.packed

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many positions."""
        return self.linear.plan

    @plan.setter
    def plan(self, plan: RoutePlan | str) -> None:
        self.linear.plan = plan

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels have taken so far, besides the stored weight."""
        return self.linear.runtime_nbytes

    def _fill(self, made: nn.Conv1d | nn.Conv2d) -> None:
        made.weight = nn.Parameter(self.weight)
        made.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        made.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class PackedConv2d(PackedConvolution):
    """A convolution with a 1x1 kernel and a packed weight: a :class:`PackedLinear` on every pixel.

    An input in channels-last order is not copied. Any other is copied into that order, and the output back.

    Args:
        linear: the weight and the bias.
        stride: pixels from one output to the next, down and across.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedConv2d
        >>> convolution = torch.nn.Conv2d(8, 4, 1)
        >>> packed = PackedConv2d(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)))
        >>> packed(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(self, linear: PackedLinear, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__(linear, stride)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of an input ``[..., in, height, width]``."""
        check_dense(input)
        pixels = input.movedim(-3, -1)
        channels_last = pixels.is_contiguous()
        if self.stride != (1, 1):
            pixels = pixels[..., :: self.stride[0], :: self.stride[1], :]
        y: Tensor = self.linear(pixels).movedim(-1, -3)
        return y if channels_last else y.contiguous()

    def to_dense(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weight and bias, in new tensors."""
        made = nn.Conv2d(self.in_channels, self.out_channels, 1, (self.stride[0], self.stride[1]), device="meta")
        self._fill(made)
        return made


class PackedConv1d(PackedConvolution):
    """A one-dimensional convolution with a kernel of 1 and a packed weight: a :class:`PackedLinear` at every position.

    The input is copied, so that its channels come last, and the output back.

    Args:
        linear: the weight and the bias.
        stride: positions from one output to the next.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedConv1d
        >>> packed = PackedConv1d(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)))
        >>> packed(torch.randn(2, 8, 5)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, linear: PackedLinear, stride: tuple[int] = (1,)) -> None:
        super().__init__(linear, stride)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of an input ``[..., in, length]``."""
        check_dense(input)
        positions = input.movedim(-2, -1)[..., :: self.stride[0], :]
        y: Tensor = self.linear(positions).movedim(-1, -2)
        return y.contiguous()

    def to_dense(self) -> nn.Conv1d:
        """Return an ``nn.Conv1d`` with the same weight and bias, in new tensors."""
        made = nn.Conv1d(self.in_channels, self.out_channels, 1, self.stride[0], device="meta")
        self._fill(made)
        return made
