"""The operators of packed weights, as compilers and autograd see them, and the code that they run.

An operator takes the tensors of a format and one line of text. Its result depends on nothing else. What is prepared to
run a weight is kept in a table outside of the tensors, only to save time. So a module with these tensors can be copied,
compiled, exported and loaded without special code.
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
from secateur._types import dtype_name
from secateur.formats import FORMATS, Format
from secateur.kernels._backends import chosen, prepare
from secateur.kernels._compact import CompactRoute
from secateur.kernels._dense import DenseRoute
from secateur.kernels._dispatch import may_skip_dispatcher
from secateur.kernels._plan import RoutePlan
from secateur.kernels._prepared import Prepared
from secateur.kernels._route import Route
from secateur.kernels._window import Pair, Window
from secateur.patterns import SparsityPattern


@dataclass(frozen=True)
class PackedSpec:
    """All that a packed weight has besides its tensors. ``str`` returns it as the text that an operator takes."""

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
        """Return the spec whose text was made by ``str``."""
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
    """A packed weight whose tensors were checked, and what was prepared to run it."""

    alive: weakref.ref[Tensor]
    versions: tuple[int, ...]
    packed: Format
    prepared: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)
    calls: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)  # by the properties of a checked input


# By the id of the first tensor of the weight: tensors cannot be keys by their contents, and an operator gets no other
# object that lives as long as the weight. An id may be given to another tensor later, so that a weak reference says
# whether it is still the same one. PyTorch counts the changes of a tensor in its version: after a change in place the
# weight is checked and prepared again, because kernels trust the indices of a checked weight.
_ready: dict[int, _Ready] = {}
_lock = threading.RLock()
# The dtypes of inputs and biases.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_CALLS = 1024  # shapes, dtypes and devices of inputs that are remembered for each weight


def _versions(weight: Sequence[Tensor]) -> tuple[int, ...]:
    # Tensors that were made in inference mode have no version. PyTorch does not let them be changed outside of it.
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in weight)


def _get_ready(weight: Sequence[Tensor], spec: str) -> _Ready:
    first = weight[0]
    key = id(first)
    ready = _ready.get(key)
    if ready is not None and ready.alive() is first and ready.versions == _versions(weight):
        return ready
    if first.is_meta:
        raise KernelError("the packed weight is on the meta device, without values. Load its state first.")
    with _lock:
        parsed = _parse(spec)
        aliases = [tensor.detach() for tensor in weight]  # the table must not keep the weight alive
        tensors = dict(zip(parsed.names, aliases, strict=True))
        packed = parsed.format_type.from_tensors(tensors, parsed.shape, parsed.pattern)
        ready = _ready[key] = _Ready(weakref.ref(first, partial(_forget, key)), _versions(weight), packed)
        return ready


def _forget(key: int, _: Any) -> None:
    _ready.pop(key, None)


def runtime_nbytes(values: Tensor) -> int:
    """Return the bytes of memory that were taken so far to run a stored weight, given its first tensor."""
    ready = _ready.get(id(values))
    if ready is None or ready.alive() is not values:
        return 0
    return sum(prepared.nbytes for prepared in list(ready.prepared.values()))


def _run(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    if x.is_meta or weight[0].is_meta:
        return _run_fake(x, weight, bias, spec)
    ready = _get_ready(weight, spec)
    shape = x.shape
    prepared = ready.calls.get((shape, x.dtype, x.device, spec, chosen.get())) or _prepare(ready, x, spec)
    rows, columns = ready.packed.shape
    check_bias(bias, rows, x.device)
    if prepared is None:
        y = x.new_zeros(*shape[:-1], rows)
        return y if bias is None else y + bias.to(x.dtype)
    if len(shape) == 2 or prepared.any_shape:
        return prepared.run(x, bias)
    return prepared.run(x.reshape(math.prod(shape[:-1]), columns), bias).view(*shape[:-1], rows)


def _prepare(ready: _Ready, x: Tensor, spec: str) -> Prepared | None:
    """Check an input, and return the weight made ready for inputs like it; None if the input is empty."""
    parsed = _parse(spec)
    check_input(x, parsed.shape[1])
    _check_device(x, ready.packed.values.device)
    if not x.numel():
        return None
    return _prepare_for(ready, x, route_for(parsed.plan, x), (x.shape, x.dtype, x.device, spec, chosen.get()))


def _prepare_for(ready: _Ready, x: Tensor, route: Route, call: tuple[Any, ...]) -> Prepared:
    key = (route, x.dtype if _depends_on_dtype(route) else None, chosen.get())
    with _lock:
        prepared = ready.prepared.get(key)
        if prepared is None:
            prepared = ready.prepared[key] = prepare(ready.packed, route, x.device, x.dtype)
        if len(ready.calls) >= _MOST_CALLS:
            ready.calls.clear()
        ready.calls[call] = prepared
    return prepared


def prepared_for_images(x: Tensor, weight: Sequence[Tensor], spec: str, window: Window) -> Prepared | None:
    """Return a weight made ready to convolve images, after checking both; None if the images or outputs are empty.

    Args:
        x: ``[images, channels, height, width]``.
        weight: the tensors of the format, in the order of the spec's names.
        spec: a :class:`PackedSpec` as text.
        window: how the kernel moves.
    """
    ready = _get_ready(weight, spec)
    call = (x.shape, x.dtype, x.device, spec, chosen.get(), window)
    found = ready.calls.get(call)
    if found is not None:
        return found
    check_images(x, weight, spec, window)
    pixels = len(x) * math.prod(window.outputs(*x.shape[2:]))
    if not (x.numel() and pixels):
        return None
    route = _parse(spec).plan.route(pixels) if x.device.type == "cpu" else DenseRoute()
    return _prepare_for(ready, x, route, call)


def check_images(x: Tensor, weight: Sequence[Tensor], spec: str, window: Window) -> Pair:
    """Raise unless images fit a packed weight, and return the size of the outputs."""
    check_dense(x)
    _check_floats("input", x)
    channels = _parse(spec).shape[1] // window.positions
    outputs = window.outputs(*x.shape[2:])
    if x.shape[1] != channels or min(outputs) < 1:
        raise KernelError(
            f"the input has shape {tuple(x.shape)}; the packed convolution takes [..., {channels}, height, width], and "
            f"its kernel of {window.kernel.down}x{window.kernel.across} must fit in the padded image. Check that the "
            "input belongs to this layer."
        )
    _check_device(x, weight[0].device)
    return outputs


def route_for(plan: RoutePlan, x: Tensor) -> Route:
    """Return the route for an input ``[..., in]``: that of the plan on the CPU, and dense on any other device."""
    return plan.route(math.prod(x.shape[:-1])) if x.device.type == "cpu" else DenseRoute()


def _depends_on_dtype(route: Route) -> bool:
    return isinstance(route.inner if isinstance(route, CompactRoute) else route, DenseRoute)


def refuse_onnx_export() -> None:
    """Raise while torch.onnx exports a model: it has no operator for a packed weight, and says so in riddles."""
    if torch.onnx.is_in_onnx_export():
        raise KernelError(
            "ONNX has no operator for packed weights, so a packed model cannot be exported.\n"
            "Make its layers dense first: secateur.unpack_(model), then torch.onnx.export(model, ...)."
        )


def _run_fake(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    refuse_onnx_export()
    rows, columns = _parse(spec).shape
    check_input(x, columns)
    _check_device(x, weight[0].device)
    return x.new_empty(*x.shape[:-1], rows)


def _run_transposed(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    """``y W``: the gradient of the input. The weight is made dense at each call, so that no copy stays in memory."""
    packed = _get_ready(weight, spec).packed
    return torch.matmul(y, packed.to_dense().to(y.dtype))


def _run_transposed_fake(y: Tensor, weight: Sequence[Tensor], spec: str) -> Tensor:
    return y.new_empty(*y.shape[:-1], _parse(spec).shape[1])


def check_dense(x: object) -> None:
    """Raise unless an input is a tensor that has all its numbers in strided memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"the input of a packed weight must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        found = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(
            f"the input of a packed weight must be a dense tensor, got {found}. Pad it, or call its to_dense()."
        )


def check_input(x: Tensor, columns: int) -> None:
    """Raise unless an input fits a packed weight with so many columns."""
    check_dense(x)
    if not x.ndim or x.shape[-1] != columns:
        raise KernelError(
            f"the input has shape {tuple(x.shape)}, but the packed weight takes {columns} features; the input should "
            f"be [..., {columns}]. Check that it belongs to this layer."
        )
    _check_floats("input", x)


def check_bias(bias: Tensor | None, rows: int, device: torch.device | None = None) -> None:
    """Raise unless a bias, if there is one, fits a packed weight with so many rows and inputs on a device."""
    if bias is None:
        return
    if bias.shape != (rows,):
        raise KernelError(
            f"the bias has shape {tuple(bias.shape)}, but the packed weight has {rows} outputs; the bias should be "
            f"[{rows}]. Check that it belongs to this layer."
        )
    if bias.dtype not in FLOATS:
        _check_floats("bias", bias)
    if device is not None and bias.device != device:
        raise KernelError(f"the bias is on {bias.device}, but the input is on {device}. Move the layer with .to().")


def _check_floats(what: str, tensor: Tensor) -> None:
    """Raise unless a tensor has a dtype that is computed with: float8 is only stored, and needs a scale."""
    if tensor.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise TypeError(
            f"the {what} of a packed weight must be floating point, got {dtype_name(tensor.dtype)}. Valid are {names}. "
            "Convert it, for example with .to(torch.float32)."
        )


def _check_device(x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise KernelError(
            f"the input is on {x.device}, but the packed weight is on {device}. Move one of them with .to(); a weight "
            "on meta has no values, so load them first."
        )


# The operator that compilers and autograd see.
@torch.library.custom_op("secateur::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    refuse_onnx_export()
    y = _run(x, weight, bias, spec)
    # PyTorch lets nothing change a view in place that is the result of an operator with a gradient of its own.
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, y.shape)


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
        raise NotImplementedError("vmap maps over the inputs of a packed layer, not over its weights; unpack it first")
    operator = _packed_linear if len(rest) == 2 else _packed_linear_transposed
    return operator(x.movedim(in_dims[0], 0), weight, *rest), 0


_packed_linear.register_vmap(_vmap)
_packed_linear_transposed.register_vmap(_vmap)

# The same without autograd: PyTorch takes a third of the time to call it, which matters for small layers.
_library = torch.library.Library("secateur", "FRAGMENT")
_library.define("packed_linear_inference(Tensor x, Tensor[] weight, Tensor? bias, str spec) -> Tensor")
_library.impl("packed_linear_inference", _run, "CompositeExplicitAutograd")
torch.library.register_fake("secateur::packed_linear_inference", _run_fake, lib=_library)
torch.library.register_vmap("secateur::packed_linear_inference", _vmap, lib=_library)
_inference = torch.ops.secateur.packed_linear_inference.default


@torch.library.custom_op("secateur::packed_dense", mutates_args=())
def _packed_dense(weight: Sequence[Tensor], spec: str) -> Tensor:
    packed = _get_ready(weight, spec).packed
    dense = packed.to_dense()
    return dense.clone() if dense.data_ptr() == packed.values.data_ptr() else dense


@_packed_dense.register_fake
def _packed_dense_fake(weight: Sequence[Tensor], spec: str) -> Tensor:
    values = weight[0]
    dtype = values.dtype if values.is_floating_point() else torch.float32
    return values.new_empty(_parse(spec).shape, dtype=dtype)


def packed_dense(weight: Sequence[Tensor], spec: str) -> Tensor:
    """Return the dense weight, as one operator that compilers need not look into.

    Args:
        weight: the tensors of the format, in the order of the spec's names.
        spec: a :class:`PackedSpec` as text.
    """
    dense: Tensor = _packed_dense(weight, spec)
    return dense


def packed_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """Return x Wᵀ + b. Packed layers and :func:`~secateur.kernels.linear` call this.

    Args:
        x: ``[..., in]``, floating point.
        weight: the tensors of the format, in the order of the spec's names.
        bias: ``[out]`` or None.
        spec: a :class:`PackedSpec` as text.

    Returns:
        ``[..., out]``, in the dtype of x.

    Raises:
        KernelError: x or the bias does not fit the weight or is on another device, or a route of the plan does not fit.
        FormatError: the tensors are not valid, for example after a change in place.
        TypeError: an x that is not a dense tensor of a dtype that is computed with.
    """
    check_dense(x)  # first: operators have no code for other layouts
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if not differentiated and may_skip_dispatcher(x):
        return _run(x, weight, bias, spec)
    # What was exported may be differentiated later. What was compiled is compiled anew for inputs with a gradient.
    if differentiated or torch.compiler.is_exporting():
        y: Tensor = _packed_linear(x, weight, bias, spec)
    else:
        if not torch.compiler.is_compiling():
            refuse_onnx_export()
        y = _inference(x, weight, bias, spec)
    return y
