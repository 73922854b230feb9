"""The layer of GPT-2, a linear layer with the weight the other way round, that learns which weights to keep."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from secateur._types import Weight
from secateur.layers import transposed_linear
from secateur.nn._gate import gated_linear
from secateur.nn._mask_settings import MaskSettings
from secateur.nn._sparse_layer import SparseLayer


class SparseConv1D(SparseLayer):
    """transformers' ``Conv1D`` with the differentiable magnitude mask of :class:`SparseLinear`.

    Its weight ``(nx, nf)`` is read as a matrix ``(nf, nx)``, of which a contiguous copy is made in each soft pass.

    Attributes:
        nx: size of each input.
        nf: size of each output.
        weight: ``(nx, nf)``, like ``mask`` and ``kept``. All others are as in :class:`SparseLinear`.

    Example:
        >>> import torch, secateur
        >>> from transformers.pytorch_utils import Conv1D
        >>> model = torch.nn.Sequential(Conv1D(4, 8))
        >>> _ = secateur.sparsify_(model, pattern="2:4")
        >>> model[0].weight.shape, model[0](torch.randn(2, 8)).shape
        (torch.Size([8, 4]), torch.Size([2, 4]))
    """

    nx: int
    nf: int

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, settings: MaskSettings) -> Self:
        """Return a sparse layer that takes over the parameters of a ``Conv1D``: the same objects, not copies.

        Args:
            conv1d: of transformers.
            settings: how to learn the mask.

        Raises:
            TypeError: not a ``Conv1D``, or its weight is not a parameter of its own.
            PatternError: a pattern that does not fit.
            RecipeError: a subclass with a behaviour of its own.
        """
        known = transposed_linear()
        if known is None or not isinstance(conv1d, known):
            raise TypeError(f"conv1d must be a Conv1D of transformers, got {type(conv1d).__name__}")
        given: Any = conv1d
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.nx, layer.nf = given.nx, given.nf
        layer._keep_shell(given)
        layer._set_up(given.weight, given.bias, settings)
        return layer.train(given.training)

    def to_conv1d(self) -> nn.Module:
        """Return a ``Conv1D`` with the effective weight, as :meth:`SparseLinear.to_linear` does.

        Raises:
            RecipeError: the weight is sharded over processes.
        """
        self._must_be_whole("to_conv1d")
        return self._plain()

    def _to_plain(self) -> nn.Module:
        return self.to_conv1d()

    @staticmethod
    def to_matrix(tensor: Tensor) -> Weight:
        """Return a tensor of the weight's shape as ``[out, in]``."""
        return tensor.T

    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return a matrix ``[out, in]`` in the weight's shape."""
        return matrix.T

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of ``x`` with the effective weight, plus the bias."""
        if self._mask_in_use() is not None or not self._own_weight.numel():
            return F.linear(x, self._effective().T, self.bias)
        return gated_linear(
            x,
            self._matrix(),
            self.bias,
            self._threshold_by_competition(),
            self.temperature,
            self._units(),
            solved=self.pattern is not None,
            hard=self.hard,
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the brackets."""
        return f"nf={self.nf}, nx={self.nx}, {self._describe()}"
