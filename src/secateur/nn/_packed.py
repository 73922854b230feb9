"""A linear layer with a packed weight."""

from __future__ import annotations

import importlib
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, KernelError, SparsityError
from secateur._types import Weight
from secateur.formats import FORMATS, VALUE_DTYPES, Format, NMPacked, choose
from secateur.kernels import Plan, Runner, default_plan, is_plain, make_runner, padded
from secateur.patterns import NM, SparsityPattern, Unstructured, satisfied

_FLOATS = ("values", "right", "bottom")


@dataclass(frozen=True)
class _Spec:
    """What a packed weight is besides its tensors."""

    kind: type[Format]
    pattern: SparsityPattern
    shape: tuple[int, int]
    names: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return "|".join((self.kind.name, str(self.pattern), size, ",".join(self.names), str(self.plan)))


@lru_cache(maxsize=4096)
def _parse_spec(text: str) -> _Spec:
    kind, pattern, size, names, plan = text.split("|")
    rows, _, columns = size.partition("x")
    return _Spec(
        FORMATS[kind],
        SparsityPattern.parse(pattern),
        (int(rows), int(columns)),
        tuple(names.split(",")),
        Plan.parse(plan),
    )


@dataclass
class _Ready:
    """A packed weight that passed every check, and what was made of it to run. Anew when one of its tensors changes."""

    alive: weakref.ref[Tensor]
    versions: tuple[int, ...]
    packed: Format
    runners: dict[tuple[str, torch.dtype | None], Runner] = field(default_factory=dict)
    calls: dict[tuple[Any, ...], Runner] = field(default_factory=dict)  # by kind of input, which was checked


# By the identity of the first tensor. An operator is a function of its tensors alone, and this only saves it work: so
# a module can be copied, compiled, exported and loaded without a thought for what was made ready.
_ready: dict[int, _Ready] = {}
_lock = threading.RLock()
_CALLS = 1024  # kinds of input remembered for each weight


def _versions(weight: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in weight)


def _get_ready(weight: Sequence[Tensor], spec: str) -> _Ready:
    first = weight[0]
    key = id(first)
    ready = _ready.get(key)
    if ready is not None and ready.alive() is first and ready.versions == _versions(weight):
        return ready
    with _lock:
        parsed = _parse_spec(spec)
        aliases = [tensor.detach() for tensor in weight]  # which do not keep the first alive
        packed = parsed.kind.from_tensors(dict(zip(parsed.names, aliases, strict=True)), parsed.shape, parsed.pattern)
        ready = _ready[key] = _Ready(weakref.ref(first, partial(_forget, key)), _versions(weight), packed)
        return ready


def _forget(key: int, _: Any) -> None:
    _ready.pop(key, None)


def _run(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    ready = _get_ready(weight, spec)
    shape = x.shape
    runner = ready.calls.get((shape, x.dtype, x.device, spec)) or _runner(ready, x, spec)
    rows, columns = ready.packed.shape
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise KernelError(
            f"the bias has shape {tuple(bias.shape)} and is on {bias.device}, but the packed weight has {rows} outputs "
            f"and the input is on {x.device}. Move the layer with .to()."
        )
    if runner is None:
        y = x.new_zeros(*shape[:-1], rows)
        return y if bias is None else y + bias.to(x.dtype)
    if len(shape) == 2:
        return runner(x, bias)
    return runner(x.reshape(math.prod(shape[:-1]), columns), bias).view(*shape[:-1], rows)


def _runner(ready: _Ready, x: Tensor, spec: str) -> Runner | None:
    """Check an input, and make the weight ready for inputs of its kind; None if it is empty."""
    parsed = _parse_spec(spec)
    _check_input(x, parsed.shape[1])
    if not x.numel():
        return None
    way = "dense" if x.device.type != "cpu" else parsed.plan.way(math.prod(x.shape[:-1]))
    key = (way, x.dtype if way in ("dense", "rows", "columns") else None)
    with _lock:
        runner = ready.runners.get(key)
        if runner is None:
            runner = ready.runners[key] = make_runner(way, ready.packed, x.dtype)
        if len(ready.calls) >= _CALLS:
            ready.calls.clear()
        ready.calls[x.shape, x.dtype, x.device, spec] = runner
    return runner


def _run_fake(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    rows, columns = _parse_spec(spec).shape
    _check_input(x, columns)
    return x.new_empty(*x.shape[:-1], rows)


def _run_transposed(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    """``y W``: the gradient of the input. Expands the weight anew, so that training keeps no second copy of it."""
    packed = _get_ready(weight, spec).packed
    return torch.matmul(y, packed.to_dense().to(y.dtype))


def _run_transposed_fake(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    return y.new_empty(*y.shape[:-1], _parse_spec(spec).shape[1])


def _check_input(x: Tensor, columns: int) -> None:
    if not x.ndim or x.shape[-1] != columns:
        raise KernelError(
            f"the input has shape {tuple(x.shape)}, but the packed weight takes {columns} features; it should be "
            f"[..., {columns}]. Check that the input belongs to this layer."
        )
    if not x.is_floating_point():
        raise TypeError(f"the input of a packed layer must be floating point, got {x.dtype}")


# The operator that compilers and autograd see.
@torch.library.custom_op("secateur::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return _run(x, weight, bias, spec)


@torch.library.custom_op("secateur::packed_linear_transposed", mutates_args=())
def _packed_linear_transposed(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    return _run_transposed(y, weight, spec)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.spec = inputs[-1]


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None, None]:
    weight = list(ctx.saved_tensors)
    return _packed_linear_transposed(gradient, weight, ctx.spec), [None] * len(weight), None, None


def _gradient_of_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None]:
    weight = list(ctx.saved_tensors)
    return _packed_linear(gradient, weight, None, ctx.spec), [None] * len(weight), None


_packed_linear.register_fake(_run_fake)
_packed_linear.register_autograd(_input_gradient, setup_context=_keep)
_packed_linear_transposed.register_fake(_run_transposed_fake)
_packed_linear_transposed.register_autograd(_gradient_of_gradient, setup_context=_keep)


def _vmap(info: Any, in_dims: Any, x: Tensor, weight: list[Tensor], *rest: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in (*in_dims[1], *in_dims[2:])):
        raise NotImplementedError("vmap goes over the inputs of a packed layer, not over its weights")
    operator = _packed_linear if len(rest) == 2 else _packed_linear_transposed
    return operator(x.movedim(in_dims[0], 0), weight, *rest), 0


_packed_linear.register_vmap(_vmap)
_packed_linear_transposed.register_vmap(_vmap)

# The same without autograd: a third of the time that PyTorch takes to call it, which small layers feel.
_library = torch.library.Library("secateur", "FRAGMENT")
_library.define("packed_linear_inference(Tensor x, Tensor[] weight, Tensor? bias, str spec) -> Tensor")
_library.impl("packed_linear_inference", _run, "CompositeExplicitAutograd")
torch.library.register_fake("secateur::packed_linear_inference", _run_fake, lib=_library)
torch.library.register_vmap("secateur::packed_linear_inference", _vmap, lib=_library)
_inference = torch.ops.secateur.packed_linear_inference.default


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored without its zeros: ``y = x Wᵀ + bias``.

    The buffers are the tensors of the storage format and the bias, so that ``deepcopy``, ``state_dict`` and ``.to`` do
    what they do for any module. What the kernels want in another order is made at the first call, kept beside the
    buffers, and made anew after they change. The layer is frozen: the gradient goes to its input only, so that it can
    lie anywhere below or above what is trained. ``torch.compile(fullgraph=True)`` and ``torch.export`` see one
    operator. Sums are float32, and the output has the input's dtype.

    A weight pruned by rows gives the bias alone where a row is gone, one pruned by columns does not read the inputs
    that are gone: shapes outside stay as they were.

    Zeros are not multiplied: an infinite or NaN input reaches only the outputs whose weight stores its column.

    Args:
        packed: the weight, from :func:`pack_` or one of the formats of ``docs/format.md``.
        bias: ``[out]``, or None.
        plan: which kernel to use at which batch; None for what the format was made for. :func:`pack_` measures.
        dtype: of the dense weight to go back to; None for that of the values, or float32 where they are int8.

    Raises:
        KernelError: a plan that is none.
        FormatError: a bias of another size.

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
        plan: Plan | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(packed, Format):
            raise TypeError(f"packed must be a storage format such as Bitmask, got {type(packed).__name__}")
        if bias is not None and tuple(bias.shape) != packed.shape[:1]:
            raise FormatError(
                f"the bias has shape {tuple(bias.shape)}, but the weight has {packed.shape[0]} outputs. "
                "Give one number for each."
            )
        self.out_features, self.in_features = packed.shape
        self._kind, self.pattern = type(packed), packed.pattern
        self.names: tuple[str, ...] = ()
        self._set_tensors(packed.tensors())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if dtype is None:
            dtype = torch.float32 if packed.value_dtype == torch.int8 else packed.value_dtype
        # Whatever .to(dtype) does to a dense layer it does to this.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=packed.values.device), persistent=False)
        self.transposed = False  # whether the dense layer was transformers' Conv1D, which keeps [in, out]
        self.plan = default_plan(packed) if plan is None else Plan.parse(plan) if isinstance(plan, str) else plan

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        pattern: SparsityPattern | str | None = None,
        value_dtype: torch.dtype | None = None,
        plan: Plan | str | None = None,
    ) -> Self:
        """Return the packed counterpart of an ``nn.Linear``: what is not zero in its weight is stored.

        Args:
            linear: the layer; it is not changed.
            pattern: that the zeros follow; None finds the one with the smallest format.
            value_dtype: of the stored values: float32, bfloat16, float16 or int8; None for the weight's own.
            plan: as for the class.

        Raises:
            PatternError: the zeros do not follow the pattern.
            FormatError: a value that ``value_dtype`` cannot hold.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if isinstance(pattern, str):
            pattern = SparsityPattern.parse(pattern)
        packed = pack_weight(weight, value_dtype, None if pattern is None else (pattern,))
        return cls(packed, linear.bias, plan, weight.dtype)

    @property
    def plan(self) -> Plan:
        """Which kernel to use at which batch."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = Plan.parse(str(plan))
        self._describe_()

    def _describe_(self) -> None:
        shape = (self.out_features, self.in_features)
        self._spec = str(_Spec(self._kind, self.pattern, shape, self.names, self._plan))

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name in self.names:
            delattr(self, name)
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, padded(tensor) if name == "values" else tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + bias`` for x ``[..., in]``, in x's dtype, or in that of autocast where it is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        buffers: dict[str, Any] = self._buffers  # attributes of a module take ten times as long to look up
        weight = [buffers[name] for name in self.names]
        differentiated = x.requires_grad and torch.is_grad_enabled()
        if not differentiated and is_plain(x):
            return _run(x, weight, buffers["bias"], self._spec)
        if torch.compiler.is_compiling() or differentiated:
            y: Tensor = _packed_linear(x, weight, buffers["bias"], self._spec)
        else:
            y = _inference(x, weight, buffers["bias"], self._spec)
        return y

    @property
    def packed(self) -> Format:
        """The weight in its storage format, on the module's own tensors."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in self.names}
        own = {name: tensors.get(name) for name in self._kind._own}
        return self._kind(
            (self.out_features, self.in_features), self.pattern, self.values, tensors.get("scales"), **own
        )

    @property
    def weight(self) -> Weight:
        """The dense weight, ``[out, in]``: computed anew each time, for code that looks at it."""
        return self.packed.to_dense().to(self._like.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return self.packed.nbytes

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels took beside the stored weight, so far."""
        ready = _ready.get(id(self.values))
        if ready is None or ready.alive() is not self.values:
            return 0
        return sum(runner.nbytes for runner in list(ready.runners.values()))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the dense weight that the layer stands for."""
        return self._like.dtype

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weight and bias, new tensors: exact but for int8 values, which are
        multiplied by their scales.
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
        """Use the tensors of another layer with the same packed weight, so that it is in memory once."""
        for name in self.names:
            self._buffers[name] = other._buffers[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            allowed = VALUE_DTYPES if name in _FLOATS else (old.dtype,)
            if new.dtype not in allowed:  # scales stay float32, and no format holds float64
                new = old.to(new.device)
            self._buffers[name] = padded(new) if name == "values" and new is not old and not new.is_meta else new
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
        """Take tensors of other sizes, as another mask has, after checking them: kernels trust what they index."""
        known = {"values", "scales", *self._kind._own}
        given = {name: state_dict[prefix + name] for name in known if prefix + name in state_dict}
        if "values" in given:
            try:
                self._kind.from_tensors(given, (self.out_features, self.in_features), self.pattern)
            except SparsityError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
            device = self.values.device
            order = [name for name in ("values", "scales", *self._kind._own) if name in given]
            self._set_tensors({name: given[name].to(device, copy=True) for name in order})
            self._describe_()
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Describe the layer."""
        values = str(self.values.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={str(self.pattern)!r}, values={values!r}, bytes={self.nbytes:,}"
        )


class PackedConv2d(nn.Module):
    """A convolution with a 1x1 kernel and a packed weight: :class:`PackedLinear` on every pixel.

    An input in channels-last order is read and written as it is; any other is copied into that order and back.

    Args:
        linear: weight and bias.
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
        pixels = x.movedim(-3, -1)
        channels_last = pixels.is_contiguous()
        if self.stride != (1, 1):
            pixels = pixels[..., :: self.stride[0], :: self.stride[1], :]
        y: Tensor = self.linear(pixels).movedim(-1, -3)
        return y if channels_last else y.contiguous()

    @property
    def plan(self) -> Plan:
        """Which kernel to use at which number of pixels."""
        return self.linear.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.linear.plan = plan

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels took beside the stored weight, so far."""
        return self.linear.runtime_nbytes

    def to_dense(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weight and bias, new tensors."""
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


def pack_weight(
    weight: Weight, value_dtype: torch.dtype | None = None, patterns: tuple[SparsityPattern, ...] | None = None
) -> Format:
    """Pack a dense weight in the smallest of the formats for some patterns; :class:`Bitmask` where none is smaller.

    Args:
        weight: ``[out, in]``.
        value_dtype: of the stored values; None for the weight's own.
        patterns: that its zeros follow; None finds them.

    Raises:
        PatternError: the zeros do not follow the pattern.
        FormatError: a value that ``value_dtype`` cannot hold.
    """
    mask = weight != 0
    if patterns is None:
        patterns = satisfied(~mask)
    elif patterns and isinstance(patterns[0], NM) and NMPacked.predicted_nbytes(mask, patterns[0]) is None:
        return NMPacked.from_dense(weight, mask, patterns[0], value_dtype)  # raises, naming the group
    dtype = weight.dtype if value_dtype is None else value_dtype
    best: tuple[int, type[Format], SparsityPattern] | None = None
    stored = int(mask.count_nonzero())
    # Random zeros fit some wide N:M by chance: that is no pattern's doing unless its format is smaller.
    by_chance = [p for p in patterns if isinstance(p, NM) and (not stored or stored * p.m != mask.numel() * p.n)]
    for pattern in (*(p for p in patterns if p not in by_chance), Unstructured(), *by_chance):
        kind = choose(pattern, mask, dtype)
        size = None if kind is None else kind.predicted_nbytes(mask, pattern, dtype)
        if kind is not None and size is not None and (best is None or size < best[0]):
            best = size, kind, pattern
    kind, pattern = (FORMATS["bitmask"], Unstructured()) if best is None else best[1:]
    return kind.from_dense(weight, mask, pattern, value_dtype)
