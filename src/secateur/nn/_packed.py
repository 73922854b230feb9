"""Layers that run packed: a linear layer, and a 1x1 convolution, which is a linear layer on every pixel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur._checks import instance
from secateur._errors import SparsityError
from secateur._types import Weight, dtype_name
from secateur.formats import VALUE_DTYPES, Format, pack
from secateur.kernels import (
    FLOATS,
    PackedSpec,
    RoutePlan,
    check_bias,
    check_dense,
    default_plan,
    packed_linear,
    runtime_nbytes,
    with_spare_values,
)
from secateur.patterns import SparsityPattern, as_pattern


class PackedLinear(nn.Module):
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

    bias: Tensor | None
    values: Tensor
    _like: Tensor

    def __init__(
        self,
        packed: Format,
        bias: Tensor | None = None,
        plan: RoutePlan | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        instance("packed", packed, Format, "a storage format such as Bitmask")  # type: ignore[type-abstract]
        check_bias(bias, packed.shape[0])
        self.out_features, self.in_features = packed.shape
        self._format_type, self.pattern = type(packed), packed.pattern
        self.names: tuple[str, ...] = ()
        self._set_tensors(packed.tensors())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if dtype is None:
            dtype = packed.dense_dtype
        # An empty tensor with the dtype of the dense weight, which .to(dtype) changes as it does for a dense layer. The
        # values cannot have it: they may be int8, and no format has float64.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=packed.values.device), persistent=False)
        self.transposed = False  # whether the dense layer was transformers' Conv1D, whose weight is [in, out]
        self.plan = default_plan(packed) if plan is None else plan

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
            value_dtype: dtype of the stored values: float32, bfloat16, float16 or int8; None for that of the weight.
            plan: as for the class.

        Raises:
            PatternError: the zeros do not follow the pattern.
            RecipeError: values cannot be stored in ``value_dtype``.
            FormatError: a weight that ``value_dtype`` cannot hold.
            TypeError: ``linear`` is not an ``nn.Linear``.
        """
        instance("linear", linear, nn.Linear, "an nn.Linear")
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        packed = pack(weight, value_dtype, None if pattern is None else (as_pattern(pattern),))
        return cls(packed, linear.bias, plan, weight.dtype)

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many input rows."""
        return self._plan

    @plan.setter
    def plan(self, plan: RoutePlan | str) -> None:
        self._plan = RoutePlan.parse(plan) if isinstance(plan, str) else plan
        self._describe_()

    def _describe_(self) -> None:
        shape = (self.out_features, self.in_features)
        self._spec = str(PackedSpec(self._format_type, self.pattern, shape, self.names, self._plan))

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name in self.names:
            delattr(self, name)
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, with_spare_values(tensor) if name == "values" else tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + bias`` for x ``[..., in]``, in the dtype of x, or in that of autocast where it is on."""
        # Not of other dtypes, which are refused, and not on meta, for which PyTorch knows no autocast.
        if getattr(x, "dtype", None) in FLOATS and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        buffers: dict[str, Any] = self._buffers  # looking up an attribute of a module takes ten times as long
        weight = [buffers[name] for name in self.names]
        return packed_linear(x, weight, buffers["bias"], self._spec)

    @property
    def packed(self) -> Format:
        """The weight in its storage format. It shares the tensors of this module."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in self.names}
        return self._format_type.assemble(tensors, (self.out_features, self.in_features), self.pattern)

    @property
    def weight(self) -> Weight:
        """The dense weight, ``[out, in]``, computed at each access. For code that only reads it."""
        return self.packed.to_dense().to(self._like.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return self.packed.nbytes

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels have taken so far, besides the stored weight."""
        return runtime_nbytes(self.values)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the dense weight that this layer replaces."""
        return self._like.dtype

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weight and bias, in new tensors.

        The weight is exact. int8 values are multiplied by their scales.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def to_dense(self) -> nn.Module:
        """Return a layer of the class that was packed: an ``nn.Linear``, or transformers' ``Conv1D``."""
        linear = self.to_linear()
        if not self.transposed:
            return linear
        made: nn.Module = importlib.import_module("transformers.pytorch_utils").Conv1D(0, 0)
        made.nf, made.nx = self.out_features, self.in_features  # type: ignore[assignment]
        made.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        made.bias = nn.Parameter(torch.zeros(self.out_features).to(self._like)) if self.bias is None else linear.bias
        return made.train(self.training)

    def share_(self, other: PackedLinear) -> None:
        """Use the tensors of another layer with the same packed weight, so that it is in memory only once."""
        for name in self.names:
            self._buffers[name] = other._buffers[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            allowed = VALUE_DTYPES if name in self._format_type.value_names else (old.dtype,)
            if new.dtype not in allowed:  # scales stay float32, and no format has float64 values
                new = old.to(new.device)
            self._buffers[name] = (
                with_spare_values(new) if name == "values" and new is not old and not new.is_meta else new
            )
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load tensors that may have other sizes, of another mask. They are checked: kernels trust their indices."""
        names = self._format_type.names
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if "values" in given:
            try:
                self._format_type.from_tensors(given, (self.out_features, self.in_features), self.pattern)
            except SparsityError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
            device = self.values.device
            self._set_tensors({name: tensor.to(device, copy=True) for name, tensor in given.items()})
            self._describe_()
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Describe the layer."""
        values = dtype_name(self.values.dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={str(self.pattern)!r}, values={values!r}, bytes={self.nbytes:,}"
        )


class PackedConv2d(nn.Module):
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
        super().__init__()
        self.linear = linear
        self.stride = stride

    @staticmethod
    def fits(module: nn.Conv2d) -> bool:
        """Return whether a convolution is a linear layer on every pixel."""
        padded_by = (0, 0) if module.padding in ("valid", "same") else module.padding
        return tuple(module.kernel_size) == (1, 1) and tuple(padded_by) == (0, 0) and module.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x ``[..., in, height, width]``."""
        check_dense(x)
        pixels = x.movedim(-3, -1)
        channels_last = pixels.is_contiguous()
        if self.stride != (1, 1):
            pixels = pixels[..., :: self.stride[0], :: self.stride[1], :]
        y: Tensor = self.linear(pixels).movedim(-1, -3)
        return y if channels_last else y.contiguous()

    @property
    def packed(self) -> Format:
        """The weight in its storage format."""
        return self.linear.packed

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many pixels."""
        return self.linear.plan

    @plan.setter
    def plan(self, plan: RoutePlan | str) -> None:
        self.linear.plan = plan

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels have taken so far, besides the stored weight."""
        return self.linear.runtime_nbytes

    def to_dense(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weight and bias, in new tensors."""
        inner = self.linear
        sizes = inner.in_features, inner.out_features
        bias = inner.bias is not None
        made = nn.Conv2d(*sizes, 1, stride=self.stride, bias=bias, device="meta")
        linear = inner.to_linear()
        made.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
        made.bias = linear.bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"stride={self.stride}"
