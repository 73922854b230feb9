"""A packed weight as its tensors and a line of text: the operators that compilers and autograd see, and what they run.

An operator is a function of its tensors and its text alone. What is made ready to run is remembered beside them, only
to save work: so a module can be copied, compiled, exported and loaded without a thought for it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.formats import FORMATS, Format
from secateur.kernels._backends import chosen, prepare
from secateur.kernels._compact import CompactRoute
from secateur.kernels._dense import DenseRoute
from secateur.kernels._dispatch import may_skip_dispatcher
from secateur.kernels._plan import RoutePlan
from secateur.kernels._prepared import Prepared
from secateur.kernels._route import Route
from secateur.patterns import SparsityPattern


@dataclass(frozen=True)
class PackedSpec:
    """What a packed weight is besides its tensors. ``str`` writes it as the line of text that an operator takes."""

    format_type: type[Format]
    pattern: SparsityPattern
    shape: tuple[int, int]
    names: tuple[str, ...]
    plan: RoutePlan

    def __str__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return "|".join((self.format_type.name, str(self.pattern), size, ",".join(self.names), str(self.plan)))

    @staticmethod
    def parse(text: str) -> PackedSpec:
        """Return what ``str`` wrote."""
        return _parse(text)


@lru_cache(maxsize=4096)
def _parse(text: str) -> PackedSpec:
    name, pattern, size, names, plan = text.split("|")
    rows, _, columns = size.partition("x")
    return PackedSpec(
        FORMATS[name],
        SparsityPattern.parse(pattern),
        (int(rows), int(columns)),
        tuple(names.split(",")),
        RoutePlan.parse(plan),
    )


@dataclass
class _Ready:
    """A packed weight that passed every check, and what was made of it to run. Anew when one of its tensors changes."""

    alive: weakref.ref[Tensor]
    versions: tuple[int, ...]
    packed: Format
    prepared: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)
    calls: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)  # by kind of input, which was checked


_ready: dict[int, _Ready] = {}  # by the identity of the first tensor
_lock = threading.RLock()
_MOST_CALLS = 1024  # kinds of input remembered for each weight


def _versions(weight: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in weight)


def _get_ready(weight: Sequence[Tensor], spec: str) -> _Ready:
    first = weight[0]
    key = id(first)
    ready = _ready.get(key)
    if ready is not None and ready.alive() is first and ready.versions == _versions(weight):
        return ready
    with _lock:
        parsed = _parse(spec)
        aliases = [tensor.detach() for tensor in weight]  # which do not keep the first alive
        tensors = dict(zip(parsed.names, aliases, strict=True))
        packed = parsed.format_type.from_tensors(tensors, parsed.shape, parsed.pattern)
        ready = _ready[key] = _Ready(weakref.ref(first, partial(_forget, key)), _versions(weight), packed)
        return ready


def _forget(key: int, _: Any) -> None:
    _ready.pop(key, None)


def runtime_nbytes(values: Tensor) -> int:
    """Return bytes of memory taken so far beside a stored weight, given its first tensor."""
    ready = _ready.get(id(values))
    if ready is None or ready.alive() is not values:
        return 0
    return sum(prepared.nbytes for prepared in list(ready.prepared.values()))


def _run(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    ready = _get_ready(weight, spec)
    shape = x.shape
    prepared = ready.calls.get((shape, x.dtype, x.device, spec, chosen.get())) or _prepare(ready, x, spec)
    rows, columns = ready.packed.shape
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise KernelError(
            f"the bias has shape {tuple(bias.shape)} and is on {bias.device}, but the packed weight has {rows} outputs "
            f"and the input is on {x.device}. Move the layer with .to()."
        )
    if prepared is None:
        y = x.new_zeros(*shape[:-1], rows)
        return y if bias is None else y + bias.to(x.dtype)
    if len(shape) == 2:
        return prepared.run(x, bias)
    return prepared.run(x.reshape(math.prod(shape[:-1]), columns), bias).view(*shape[:-1], rows)


def _prepare(ready: _Ready, x: Tensor, spec: str) -> Prepared | None:
    """Check an input, and make the weight ready for inputs of its kind; None if it is empty."""
    parsed = _parse(spec)
    _check_input(x, parsed.shape[1])
    if not x.numel():
        return None
    route = route_for(parsed.plan, x)
    in_force = chosen.get()
    key = (route, x.dtype if _depends_on_dtype(route) else None, in_force)
    with _lock:
        prepared = ready.prepared.get(key)
        if prepared is None:
            prepared = ready.prepared[key] = prepare(ready.packed, route, x.device, x.dtype)
        if len(ready.calls) >= _MOST_CALLS:
            ready.calls.clear()
        ready.calls[x.shape, x.dtype, x.device, spec, in_force] = prepared
    return prepared


def route_for(plan: RoutePlan, x: Tensor) -> Route:
    """Return the route that an input ``[..., in]`` takes: that of the plan, which was made for the processor."""
    return plan.route(math.prod(x.shape[:-1])) if x.device.type == "cpu" else DenseRoute()


def _depends_on_dtype(route: Route) -> bool:
    return isinstance(route.inner if isinstance(route, CompactRoute) else route, DenseRoute)


def _run_fake(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    rows, columns = _parse(spec).shape
    _check_input(x, columns)
    return x.new_empty(*x.shape[:-1], rows)


def _run_transposed(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    """``y W``: the gradient of the input. Expands the weight anew, so that training keeps no second copy of it."""
    packed = _get_ready(weight, spec).packed
    return torch.matmul(y, packed.to_dense().to(y.dtype))


def _run_transposed_fake(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    return y.new_empty(*y.shape[:-1], _parse(spec).shape[1])


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


def packed_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """Return x Wᵀ + b: the door through which packed layers and :func:`~secateur.kernels.linear` go.

    Args:
        x: ``[..., in]``, floating point.
        weight: the tensors of the format, in the order of the spec's names.
        bias: ``[out]`` or None.
        spec: a :class:`PackedSpec` as text.

    Returns:
        ``[..., out]``, in x's dtype.
    """
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if not differentiated and may_skip_dispatcher(x):
        return _run(x, weight, bias, spec)
    if torch.compiler.is_compiling() or differentiated:
        y: Tensor = _packed_linear(x, weight, bias, spec)
    else:
        y = _inference(x, weight, bias, spec)
    return y
