"""Layers that learn which of their weights to keep: linear and two-dimensional convolution."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._checks import instance, integer
from secateur._checks import settings as settings_of
from secateur._types import Weight
from secateur.nn._gate import gated_linear
from secateur.nn._mask_settings import THRESHOLD, MaskSettings
from secateur.nn._sparse_layer import SparseLayer
from secateur.patterns import SparsityPattern, as_pattern


class SparseLinear(SparseLayer):
    r"""A linear layer with a differentiable magnitude mask.

    .. math::
        \text{mask} = \sigma((|\text{weight}| - \text{threshold}) \cdot \text{temperature}), \quad
        y = x (\text{weight} \odot \text{mask})^T + \text{bias}

    Without a pattern the threshold is learned by gradient descent, one for each output neuron, or one for each weight
    with :meth:`unstructured`; the sparsity is what comes of it. With a pattern and a sparsity the threshold is solved,
    so that the mask sits on the budget exactly: the score of a unit is the root mean square of its weights, the
    threshold lies between the last score that goes and the first that stays, and the temperature is in units of
    1 / threshold.
    ``secateur.SparseTraining`` does the rest: it solves the threshold after every step, anneals the temperature and
    freezes the mask. A training step costs a few element-wise passes over the weight more than ``nn.Linear`` and keeps
    one more tensor of its size, the effective weight.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: learn an additive bias, zero at first.
        structured: one threshold for each output neuron, else one for each weight. Without a pattern only.
        pattern: learn under this pattern, a :class:`SparsityPattern` or its text.
        sparsity: the fraction of units to prune under the pattern; N:M fixes its own.
        temperature: sharpness of the mask; 10 by default, 4 under a pattern. May be assigned at any time.
        threshold: initial value of the learned thresholds.
        hard: use the hard mask forward and the slope of the sigmoid backward (straight-through estimator).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(out_features, in_features)``, Kaiming-uniform at first.
        bias: ``(out_features,)`` or None.
        threshold: a parameter ``(out_features,)``, or ``(out_features, in_features)`` if not structured; under a
            pattern a buffer ``(competitions, 1)``.
        temperature: a scalar buffer.
        kept: a buffer in the weight's shape: 1 where a hard mask keeps, all 0 while the mask is soft.
        stage: a scalar buffer: 0 while the mask is soft, 2 once it is frozen; 1 where pruned weights learn behind it.
        mask: None, or the frozen mask after :meth:`hard_prune`, bool.

    Raises:
        PatternError: a pattern that does not fit, or an impossible sparsity.
        RecipeError: a temperature that is not positive and finite, a threshold that is NaN, or a negative size.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch, secateur
        >>> layer = secateur.SparseLinear(8, 4)
        >>> layer(torch.randn(2, 3, 8)).shape, layer.threshold.shape, layer.num_parameters()
        (torch.Size([2, 3, 4]), torch.Size([4]), 40)
        >>> layer = secateur.SparseLinear(8, 4, pattern="2:4")
        >>> layer.hard_prune()
        >>> layer
        SparseLinear(in_features=8, out_features=4, bias=True, structured=True, pattern='2:4', density=0.5000)

    Reference:
        Learned thresholds: Azarian et al., "Learned Threshold Pruning", 2020, arXiv:2003.00075. Thresholds from the
        budget: Cho et al., "PDP: Parameter-free Differentiable Pruning is All You Need", 2023, arXiv:2305.11203.
        Differs from the papers: magnitudes instead of squares; the backward pass holds the sum of the mask constant.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = nn.Linear(1, 1, bias, device="meta")  # not of these sizes: it would warn of one that is 0
        dense.in_features = integer("in_features", in_features, 0)
        dense.out_features = integer("out_features", out_features, 0)
        self._take_over(dense)
        weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if weight.numel():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        given = None if pattern is None else as_pattern(pattern)
        settings = MaskSettings(structured, given, sparsity, temperature, threshold, hard)
        self._set_up(weight, zeros, settings)

    @classmethod
    def unstructured(cls, in_features: int, out_features: int, **keywords: Any) -> Self:
        """Return a layer with one learned threshold for each weight; keywords as for the class."""
        return cls(in_features, out_features, structured=False, **keywords)

    @classmethod
    def with_bias(cls, in_features: int, out_features: int, bias: bool, **keywords: Any) -> Self:
        """Return a layer with or without a bias; keywords as for the class."""
        return cls(in_features, out_features, bias, **keywords)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        settings: MaskSettings | None = None,
        structured: bool | None = None,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        hard: bool | None = None,
    ) -> Self:
        """Return a sparse layer that takes over the parameters of ``linear``: the same objects, not copies.

        Args:
            linear: an ``nn.Linear``, or one of a subclass that computes the same. Of its parameters nothing is copied.
            settings: a :class:`~secateur.nn.MaskSettings`, instead of the keywords that follow.
            structured: see the class, like all that follow.
            pattern: see the class.
            sparsity: see the class.
            temperature: see the class.
            threshold: see the class.
            hard: see the class.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or its weight is not a parameter of its own.
            PatternError: as for the class.
            RecipeError: as for the class, both ``settings`` and keywords, or a subclass with a behaviour of its own.

        Example:
            >>> import torch, secateur
            >>> linear = torch.nn.Linear(8, 4)
            >>> secateur.SparseLinear.from_linear(linear, pattern="1:4").weight is linear.weight
            True
        """
        instance("linear", linear, nn.Linear, "an nn.Linear")
        keywords = {
            "structured": structured,
            "pattern": pattern,
            "sparsity": sparsity,
            "temperature": temperature,
            "threshold": threshold,
            "hard": hard,
        }
        settings = settings_of("MaskSettings", settings, MaskSettings, keywords)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(linear)
        layer._set_up(linear.weight, linear.bias, settings)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return a layer of the class it was made from, with the effective weight, true zeros in the pruned places.

        It takes over the parameters of this layer, which is of no use afterwards: optimizers keep working. Under a
        pattern exactly the budget is pruned first, as by :meth:`hard_prune`.

        Raises:
            RecipeError: the weight is sharded over processes.
        """
        self._must_be_whole("to_linear")
        return self._plain()  # type: ignore[return-value]

    def _to_plain(self) -> nn.Module:
        return self.to_linear()

    def _take_over(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._keep_shell(linear)

    @staticmethod
    def to_matrix(tensor: Tensor) -> Weight:
        """Return a tensor of the weight's shape itself."""
        return tensor

    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return the matrix itself."""
        return matrix

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the input ``[..., in]`` with the effective weight, plus the bias."""
        if self._mask_in_use() is not None or not self._own_weight.numel():
            return F.linear(input, self._effective(), self.bias)
        return gated_linear(
            input,
            self._own_weight,
            self.bias,
            self._threshold_by_competition(),
            self.temperature,
            self._units(),
            solved=self.pattern is not None,
            hard=self.hard,
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class SparseConv2d(SparseLayer):
    """A two-dimensional convolution with the differentiable magnitude mask of :class:`SparseLinear`.

    Its weight ``(out, in / groups, height, width)`` is read as a matrix ``(out, in / groups * height * width)``.
    ``Row()`` prunes output channels and ``Column()`` input channels, all their kernel positions at once.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: as for ``nn.Conv2d``, like ``stride``, ``padding``, ``dilation``, ``groups`` and ``padding_mode``.
        stride: see ``nn.Conv2d``.
        padding: see ``nn.Conv2d``.
        dilation: see ``nn.Conv2d``.
        groups: see ``nn.Conv2d``.
        bias: learn an additive bias, zero at first.
        padding_mode: see ``nn.Conv2d``.
        structured: as for :class:`SparseLinear`, like all that follow.
        pattern: see :class:`SparseLinear`.
        sparsity: see :class:`SparseLinear`.
        temperature: see :class:`SparseLinear`.
        threshold: see :class:`SparseLinear`.
        hard: see :class:`SparseLinear`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        PatternError: a pattern that does not fit, or an impossible sparsity.
        RecipeError: a temperature that is not positive and finite, or a threshold that is NaN.
        TypeError: an argument of the wrong type.
        ValueError: sizes that ``nn.Conv2d`` refuses.

    Example:
        >>> import torch, secateur
        >>> layer = secateur.SparseConv2d(3, 8, 3, padding=1, pattern="row", sparsity=0.5)
        >>> layer.hard_prune()
        >>> layer(torch.randn(1, 3, 5, 5)).shape, layer.sparsity()
        (torch.Size([1, 8, 5, 5]), 0.5)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same", "valid"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if dense.bias is not None:
            nn.init.zeros_(dense.bias)
        self._take_over(dense)
        given = None if pattern is None else as_pattern(pattern)
        settings = MaskSettings(structured, given, sparsity, temperature, threshold, hard)
        self._set_up(dense.weight, dense.bias, settings)

    def _take_over(self, convolution: nn.Conv2d) -> None:
        """Copy everything but the parameters."""
        self._keep_shell(convolution)
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride, self.padding = convolution.kernel_size, convolution.stride, convolution.padding
        self.dilation, self.groups, self.padding_mode = (
            convolution.dilation,
            convolution.groups,
            convolution.padding_mode,
        )
        self.transposed, self.output_padding = convolution.transposed, convolution.output_padding
        self._reversed_padding_repeated_twice = convolution._reversed_padding_repeated_twice

    @classmethod
    def from_conv2d(
        cls,
        convolution: nn.Conv2d,
        *,
        settings: MaskSettings | None = None,
        structured: bool | None = None,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        hard: bool | None = None,
    ) -> Self:
        """Return a sparse layer that takes over the parameters of ``convolution``: the same objects, not copies.

        Args:
            convolution: an ``nn.Conv2d``, or one of a subclass that computes the same. Of its parameters nothing is
                copied.
            settings: a :class:`~secateur.nn.MaskSettings`, instead of the keywords that follow.
            structured: see the class, like all that follow.
            pattern: see the class.
            sparsity: see the class.
            temperature: see the class.
            threshold: see the class.
            hard: see the class.

        Raises:
            TypeError: ``convolution`` is not an ``nn.Conv2d``, or its weight is not a parameter of its own.
            PatternError: as for the class.
            RecipeError: as for the class, both ``settings`` and keywords, or a subclass with a behaviour of its own.
        """
        instance("convolution", convolution, nn.Conv2d, "an nn.Conv2d")
        keywords = {
            "structured": structured,
            "pattern": pattern,
            "sparsity": sparsity,
            "temperature": temperature,
            "threshold": threshold,
            "hard": hard,
        }
        settings = settings_of("MaskSettings", settings, MaskSettings, keywords)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(convolution)
        layer._set_up(convolution.weight, convolution.bias, settings)
        return layer.train(convolution.training)

    def to_conv2d(self) -> nn.Conv2d:
        """Return a layer of the class it was made from, with the effective weight, true zeros in the pruned places.

        It takes over the parameters of this layer, which is of no use afterwards: optimizers keep working. Under a
        pattern exactly the budget is pruned first, as by :meth:`hard_prune`.

        Raises:
            RecipeError: the weight is sharded over processes.
        """
        self._must_be_whole("to_conv2d")
        return self._plain()  # type: ignore[return-value]

    def _to_plain(self) -> nn.Module:
        return self.to_conv2d()

    @staticmethod
    def to_matrix(tensor: Tensor) -> Weight:
        """Return a tensor of the weight's shape as ``[out, in / groups * height * width]``."""
        return tensor.flatten(1)

    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return a matrix as ``to_matrix`` makes them in the weight's shape."""
        return matrix.view(self._own_weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input with the effective weight, plus the bias."""
        x = input
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0  # type: ignore[assignment]
        return F.conv2d(x, self._effective(), self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the brackets."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        other = [f"{name}={getattr(self, name)!r}, " for name, value in usual.items() if getattr(self, name) != value]
        return f"{shape}, {''.join(other)}{self._describe()}"
