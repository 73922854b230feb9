"""Linear layers that run packed: that of PyTorch, and that of transformers with the weight the other way round."""

from __future__ import annotations

import importlib
from typing import Self

import torch
from torch import Tensor, nn

from secateur._checks import instance
from secateur._errors import RecipeError
from secateur.formats import pack
from secateur.kernels import RoutePlan
from secateur.layers import own_behaviour
from secateur.nn._packed_matrix import PackedMatrix
from secateur.patterns import SparsityPattern, as_pattern


class PackedLinear(PackedMatrix):
    """A linear layer whose weight is stored without its zeros: ``y = x Wᵀ + bias``.

    The buffers are the tensors of the storage format and the bias, so that ``deepcopy``, ``state_dict`` and ``.to``
    work as for any module. Kernels need the weight in another order. It is made at the first call, kept outside of the
    buffers, and made again after they change. The layer is frozen: only its input gets a gradient. Layers before and
    after it can be trained. ``torch.compile(fullgraph=True)`` and ``torch.export`` see one operator. Sums are float32,
    and the output has the dtype of the input.

    The shapes of inputs and outputs are those of the dense layer. Where a weight lacks a row, the output is the bias
    alone. Where it lacks a column, the input is not read.

    Zeros that are not stored are not multiplied: an infinity or NaN in the input affects only outputs that store a
    weight for it.

    Args:
        packed: the weight, in one of the formats of ``docs/format.md``.
        bias: ``[out]``, or None.
        plan: which route to take for how many input rows; None for the route that the format was made for.
            :func:`pack_` measures which is best.
        dtype: dtype of the dense weight that this layer replaces; None for that of the values, or float32 for int8.

    Raises:
        KernelError: a text that is not a plan, or a bias of another size.
        TypeError: ``packed`` is not a storage format.

    Example:
        >>> import torch, secateur
        >>> linear = torch.nn.Linear(64, 32)
        >>> _ = secateur.prune_(torch.nn.Sequential(linear), pattern="2:4", method="magnitude")
        >>> layer = secateur.PackedLinear.from_linear(linear)
        >>> layer
        PackedLinear(in_features=64, out_features=32, bias=True, pattern='2:4', values='float32', bytes=4,352)
        >>> x = torch.randn(3, 64)
        >>> torch.allclose(layer(x), linear(x), atol=1e-6)
        True
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        pattern: SparsityPattern | str | None = None,
        value_dtype: torch.dtype | None = None,
        plan: RoutePlan | str | None = None,
    ) -> Self:
        """Return the packed layer for an ``nn.Linear``. It stores the weights that are not zero.

        Args:
            linear: the layer, which is not changed.
            pattern: the pattern that the zeros follow; None for the one with the smallest format.
            value_dtype: dtype of the stored values: float32, bfloat16, float16, int8 or ``formats.INT4``; None for
                that of the weight.
            plan: as for the class.

        Raises:
            PatternError: the zeros do not follow the pattern.
            RecipeError: values cannot be stored in ``value_dtype``, or a subclass with a behaviour of its own.
            FormatError: a weight that ``value_dtype`` cannot hold.
            TypeError: ``linear`` is not an ``nn.Linear``.
        """
        instance("linear", linear, nn.Linear, "an nn.Linear")
        assert isinstance(linear, nn.Linear)
        if (reason := own_behaviour(linear)) is not None:
            raise RecipeError(f"{reason}.\nKeep this layer dense.")
        weight = linear.weight.detach()
        packed = pack(weight, value_dtype, None if pattern is None else (as_pattern(pattern),))
        return cls(packed, linear.bias, plan, weight.dtype)

    @property
    def in_features(self) -> int:
        """Size of each input."""
        return self._shape[1]

    @property
    def out_features(self) -> int:
        """Size of each output."""
        return self._shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, for code that reads it: see :class:`PackedWeight`."""
        return self._read()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x Wᵀ + bias`` for an input ``[..., in]``, in its dtype, or in that of autocast where it is on."""
        return self._multiply(input)

    def to_dense(self) -> nn.Module:
        """Return an ``nn.Linear`` with the same weight and bias, in new tensors."""
        return self.to_linear()

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class PackedConv1D(PackedMatrix):
    """transformers' ``Conv1D`` with a packed weight: a :class:`PackedLinear` for a weight that is ``[in, out]``.

    Args:
        packed: as for :class:`PackedLinear`, like all that follow: ``[out, in]``.
        bias: see there.
        plan: see there.
        dtype: see there.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedConv1D
        >>> layer = PackedConv1D(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)).packed)
        >>> (layer.nx, layer.nf), layer.weight.shape
        ((8, 4), torch.Size([8, 4]))
    """

    @property
    def nx(self) -> int:
        """Size of each input."""
        return self._shape[1]

    @property
    def nf(self) -> int:
        """Size of each output."""
        return self._shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight, ``[in, out]``, for code that reads it: see :class:`PackedWeight`."""
        return self._read().T

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W + bias`` for an input ``[..., in]``, in its dtype, or in that of autocast where it is on."""
        return self._multiply(x)

    def to_dense(self) -> nn.Module:
        """Return transformers' ``Conv1D`` with the same weight and bias, in new tensors."""
        made: nn.Module = importlib.import_module("transformers.pytorch_utils").Conv1D(0, 0)
        made.nf, made.nx = self.nf, self.nx  # type: ignore[assignment]
        made.weight = nn.Parameter(self.matrix().T.contiguous())
        bias = torch.zeros(self.nf).to(self._like) if self.bias is None else self.bias.clone()
        made.bias = nn.Parameter(bias)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"nf={self.nf}, nx={self.nx}, {self._describe()}"
