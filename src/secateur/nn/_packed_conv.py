"""Convolutions that run packed: in one and in two dimensions, with any kernel, but without groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from secateur._errors import KernelError
from secateur.formats import Format
from secateur.kernels import Pair, RoutePlan, Window, check_dense
from secateur.nn._packed import PackedLinear


class PackedConvolution(nn.Module, ABC):
    """A convolution without groups, with a packed weight: all but how many dimensions it moves in.

    The attributes are those of the dense layer. The padding has always the form of numbers.
    """

    groups, padding_mode, transposed = 1, "zeros", False
    window: Window

    def __init__(
        self,
        linear: PackedLinear,
        stride: tuple[int, ...],
        kernel_size: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.linear = linear
        self.stride, self.kernel_size, self.padding, self.dilation = stride, kernel_size, padding, dilation
        self.output_padding = (0,) * len(stride)
        self.window = window_of(kernel_size, stride, padding, dilation)
        if linear.in_features % self.window.positions:
            raise KernelError(
                f"a kernel of {'x'.join(map(str, kernel_size))} does not fit a weight of {linear.in_features} columns; "
                "these are the channels of the input times the positions of the kernel. Give the size of the kernel."
            )

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a layer of the class that was packed, with the same weight and bias in new tensors."""

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.linear.in_features // self.window.positions

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.linear.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, ``[out, in, *kernel]``, computed at each access. For code that only reads it."""
        return self.linear.weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        return self.linear.bias

    @property
    def packed(self) -> Format:
        """The weight in its storage format: a matrix ``[out, in * positions of the kernel]``."""
        return self.linear.packed

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many output positions."""
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
        described = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if any(self.padding):
            described += f", padding={self.padding}"
        return described if set(self.dilation) == {1} else f"{described}, dilation={self.dilation}"


def window_of(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Window:
    """Return how a kernel moves. What a convolution lacks of two dimensions is a row of one position."""
    pairs = zip((1, 1, 0, 1), (kernel, stride, padding, dilation), strict=True)
    return Window(*(Pair(*(fill,) * (2 - len(sizes)), *sizes) for fill, sizes in pairs))


def numeric_padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    """Return the padding of a convolution as numbers, or None if it adds more on one side than on the other."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        reach = [d * (kernel - 1) for d, kernel in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(total % 2 for total in reach) else tuple(total // 2 for total in reach)
    return tuple(module.padding)  # type: ignore[arg-type]


def why_not_convolution(module: nn.Conv1d | nn.Conv2d) -> str | None:
    """Return the reason why no packed convolution can replace one, or None."""
    if module.groups != 1:
        return f"a convolution with {module.groups} groups: each output reads too few inputs to gain from zeros"
    padding = numeric_padding(module)
    if padding is None:
        return "a convolution that pads one side more than the other"
    if module.padding_mode != "zeros" and any(padding):
        return f"a convolution with the padding mode {module.padding_mode!r}; kernels pad with zeros"
    return None


class PackedConv2d(PackedConvolution):
    """A convolution with a packed weight: a :class:`PackedLinear` on what the kernel covers at every output pixel.

    Images are read as they lie in memory: kernels of panels and tiles neither transpose nor unfold them. Other routes
    unfold them first. The output has the memory format of the input.

    Args:
        linear: the weight, ``[out, in * positions of the kernel]``, and the bias.
        stride: pixels from one output to the next, down and across.
        kernel_size: positions of the kernel, down and across.
        padding: zeros added to each side of an image.
        dilation: pixels from one position of the kernel to the next.

    Raises:
        KernelError: the kernel does not fit the weight.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedConv2d
        >>> linear = secateur.PackedLinear.from_linear(torch.nn.Linear(8 * 9, 4))
        >>> packed = PackedConv2d(linear, kernel_size=(3, 3), padding=(1, 1))
        >>> packed(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        linear: PackedLinear,
        stride: tuple[int, int] = (1, 1),
        kernel_size: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(linear, stride, kernel_size, padding, dilation)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of an input ``[..., in, height, width]``."""
        check_dense(input)
        if input.ndim == 4:
            return self.linear.convolution(input, self.window)
        _check_dimensions(input, 3, "height, width")
        images = input.reshape(-1, *input.shape[-3:])
        y = self.linear.convolution(images, self.window)
        return y.reshape(*input.shape[:-3], *y.shape[1:])

    def to_dense(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weight and bias, in new tensors."""
        window = self.window
        made = nn.Conv2d(
            *(self.in_channels, self.out_channels, window.kernel, window.stride, window.padding, window.dilation),
            device="meta",
        )
        self._fill(made)
        return made


class PackedConv1d(PackedConvolution):
    """A one-dimensional convolution with a packed weight: a :class:`PackedConv2d` on images of one row.

    Args:
        linear: the weight, ``[out, in * positions of the kernel]``, and the bias.
        stride: positions from one output to the next.
        kernel_size: positions of the kernel.
        padding: zeros added at each end.
        dilation: positions of the input from one position of the kernel to the next.

    Raises:
        KernelError: the kernel does not fit the weight.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedConv1d
        >>> packed = PackedConv1d(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)))
        >>> packed(torch.randn(2, 8, 5)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(
        self,
        linear: PackedLinear,
        stride: tuple[int] = (1,),
        kernel_size: tuple[int] = (1,),
        padding: tuple[int] = (0,),
        dilation: tuple[int] = (1,),
    ) -> None:
        super().__init__(linear, stride, kernel_size, padding, dilation)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of an input ``[..., in, length]``."""
        check_dense(input)
        _check_dimensions(input, 2, "length")
        images = input.reshape(-1, input.shape[-2], 1, input.shape[-1])
        y = self.linear.convolution(images, self.window)
        return y.reshape(*input.shape[:-2], y.shape[1], y.shape[3])

    def to_dense(self) -> nn.Conv1d:
        """Return an ``nn.Conv1d`` with the same weight and bias, in new tensors."""
        sizes = self.kernel_size[0], self.stride[0], self.padding[0], self.dilation[0]
        made = nn.Conv1d(self.in_channels, self.out_channels, *sizes, device="meta")
        self._fill(made)
        return made


def _check_dimensions(input: Tensor, fewest: int, sizes: str) -> None:
    if input.ndim < fewest:
        raise KernelError(
            f"the input has shape {tuple(input.shape)}; the packed convolution takes [..., channels, {sizes}]. Check "
            "that it belongs to this layer."
        )
