"""What layers with a packed weight share: the tensors of its format, how it is run, and states of other masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur._checks import instance
from secateur._errors import SparsityError
from secateur._types import Weight
from secateur.formats import VALUE_DTYPES, Format, value_name
from secateur.kernels import (
    FLOATS,
    PackedSpec,
    RoutePlan,
    Window,
    check_bias,
    default_plan,
    packed_convolution,
    packed_dense,
    packed_linear,
    runtime_nbytes,
    with_spare_values,
)
from secateur.nn._packed_weight import PackedWeight


def _learns(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()


class PackedMatrix(nn.Module, ABC):
    """A layer whose weight matrix is stored without its zeros: all but how the layer that was packed has it."""

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
        self._shape = packed.shape
        self._format_type, self.pattern = type(packed), packed.pattern
        self.names: tuple[str, ...] = ()
        self._set_tensors(packed.tensors())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if dtype is None:
            dtype = packed.dense_dtype
        # An empty tensor with the dtype of the dense weight, which .to(dtype) changes as it does for a dense layer. The
        # values cannot have it: they may be int8, and no format has float64.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=packed.values.device), persistent=False)
        self.plan = default_plan(packed) if plan is None else plan

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many input rows."""
        return self._plan

    @plan.setter
    def plan(self, plan: RoutePlan | str) -> None:
        self._plan = RoutePlan.parse(plan) if isinstance(plan, str) else plan
        self._describe_()

    def _describe_(self) -> None:
        self._spec = str(PackedSpec(self._format_type, self.pattern, self._shape, self.names, self._plan))

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name in self.names:
            delattr(self, name)
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, with_spare_values(tensor) if name == "values" else tensor.detach())

    def _multiply(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + bias`` for x ``[..., in]``, in the dtype of x, or in that of autocast where it is on."""
        return self.product(x, self._buffers["bias"])

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + bias`` as a call of a linear layer does, with another bias ``[out]``, or with none."""
        x, weight = self._cast(x), self._weight()
        if _learns(bias):  # the operator has no gradient for a bias
            return packed_linear(x, weight, None, self._spec) + bias.to(x.dtype)  # type: ignore[union-attr]
        return packed_linear(x, weight, bias, self._spec)

    def convolution(self, x: Tensor, window: Window) -> Tensor:
        """Return the convolution of x ``[images, channels, height, width]``, as a call of a convolution does.

        The matrix is ``[out, channels * positions of the kernel]``.
        """
        x, weight, bias = self._cast(x), self._weight(), self._buffers["bias"]
        if _learns(bias):
            y = packed_convolution(x, weight, None, self._spec, window)
            return y + bias.to(x.dtype)[:, None, None]  # type: ignore[union-attr]
        return packed_convolution(x, weight, bias, self._spec, window)

    def _cast(self, x: Tensor) -> Tensor:
        # Not of dtypes that are refused, not of float64, which PyTorch leaves as it is, and not on the meta device.
        dtype = getattr(x, "dtype", None)
        is_cast = dtype in FLOATS and dtype != torch.float64 and not x.is_meta
        if is_cast and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _weight(self) -> list[Tensor]:
        buffers: dict[str, Any] = self._buffers  # looking up an attribute of a module takes ten times as long
        return [buffers[name] for name in self.names]

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return ``x Wᵀ + bias`` for an input ``[..., in]``, in its dtype, or in that of autocast where it is on."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight in the shape of the layer that was packed, for code that reads it."""

    def _read(self) -> Tensor:
        """The weight ``[out, in]`` for code that reads it: packed, but dense while a compiler traces."""
        if torch.compiler.is_compiling():
            weight: list[Any] = [self._buffers[name] for name in self.names]
            return packed_dense(weight, self._spec).to(self._like.dtype)
        made, of = self.__dict__.get("_view", (None, None))
        if of is not self._buffers["_like"]:  # another dtype or device
            made = PackedWeight((self,))
            self.__dict__["_view"] = made, self._buffers["_like"]
        return made  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what reads this very layer."""
        return {key: value for key, value in self.__dict__.items() if key != "_view"}

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self._shape

    @property
    def weight_device(self) -> torch.device:
        """Where the weight is."""
        return self.values.device

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a layer of the class that was packed, with the same weight and bias in new tensors."""

    @property
    def packed(self) -> Format:
        """The weight in its storage format. It shares the tensors of this module."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in self.names}
        return self._format_type.assemble(tensors, self._shape, self.pattern)

    def matrix(self) -> Weight:
        """Return the dense weight, ``[out, in]``."""
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
        linear = nn.Linear(self._shape[1], self._shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.matrix())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def share_(self, other: PackedMatrix) -> None:
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
                self._format_type.from_tensors(given, self._shape, self.pattern)
            except SparsityError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
            device = self.values.device
            self._set_tensors({name: tensor.to(device, copy=True) for name, tensor in given.items()})
            self._describe_()
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self) -> str:
        values = value_name(self.values.dtype)
        return f"bias={self.bias is not None}, pattern={str(self.pattern)!r}, values={values!r}, bytes={self.nbytes:,}"
