"""Backends: what can run a route on this machine, which backend does, and why the others do not.

A new backend is one class and its name in ``BACKENDS``. A backend says whether it supports a weight, a route, a device
and a dtype, or why not, and prepares the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._errors import KernelError
from secateur.formats import Format
from secateur.kernels import _native_backend
from secateur.kernels._compact import CompactRoute
from secateur.kernels._dense import DenseRoute, PrepackedBfloat16Route, PrepackedRoute, multiplies_bfloat16
from secateur.kernels._layout import Layout
from secateur.kernels._load import load
from secateur.kernels._prepared import Prepared, StoredWeight, in_channels_last
from secateur.kernels._route import LayoutRoute, Route
from secateur.kernels._window import Window

# The backend and the instruction set that `use` asks for, while it is in force. A context variable, so that it applies
# to the thread or task that called `use` and to no other.
chosen: ContextVar[tuple[str | None, str | None]] = ContextVar("secateur_backend", default=(None, None))


class Backend(ABC):
    """Code that runs some routes on some devices."""

    name: ClassVar[str]

    @abstractmethod
    def state(self) -> str:
        """Return "ok", or the reason why the backend cannot run on this machine."""

    @abstractmethod
    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Return the reason why the backend cannot run a weight for such inputs, or None if it can.

        Args:
            packed: a weight in its storage format, or laid out already.
            route: to run it by; None for a layout.
            device: of the inputs.
            dtype: of the inputs.
        """

    @abstractmethod
    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        """Return a weight made ready for a route that is supported, for inputs of a dtype."""


class _Native(Backend):
    name = "native"

    def state(self) -> str:
        native = load()
        if isinstance(native, str):
            return native
        try:
            _native_backend.default_isa()
        except KernelError as error:
            return str(error)
        return "ok"

    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        if not _runs_a_layout(route):
            return f"the route {route} has no native kernel"
        for what, where in (("x", device), ("the weight", packed.values.device)):
            if where.type != "cpu":
                return f"{what} is on {where}; the native kernels run on the CPU"
        native = load()
        return native if isinstance(native, str) else None

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        return _NativeKernel(*_laid_out(weight, route))


class _OneDNN(Backend):
    name = "onednn"

    def state(self) -> str:
        if not torch.backends.mkldnn.is_available():
            return "this PyTorch was built without oneDNN"
        if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
            return "this version of PyTorch has no operators for oneDNN's prepacked weights"
        return "ok"

    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        if not isinstance(route, _OF_ONEDNN):
            return "it runs only the routes prepacked and prepacked-bfloat16"
        if device.type != "cpu":
            return f"x is on {device}; it runs on the CPU"
        if isinstance(route, PrepackedBfloat16Route) and not multiplies_bfloat16(device):
            return "this processor has no instructions for bfloat16 (AVX512_BF16 or AMX), so that it would be slow"
        return None if self.state() == "ok" else self.state()

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        reduced = isinstance(route, PrepackedBfloat16Route)
        return _Prepacked(weight.to_dense(), torch.bfloat16 if reduced else torch.float32)


class _Reference(Backend):
    name = "reference"

    def state(self) -> str:
        return "ok"

    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        return f"only onednn runs the route {route}" if isinstance(route, _OF_ONEDNN) else None

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        if isinstance(route, DenseRoute):
            dense = weight.to_dense()
            stored = isinstance(weight, StoredWeight) and dense.data_ptr() == weight.owner.data_ptr()
            return _Dense(dense.to(dtype), shared=stored and dense.dtype == dtype)
        return _ExpandedAtEachCall(*_laid_out(weight, route))


_OF_ONEDNN = (PrepackedRoute, PrepackedBfloat16Route)
# In order of preference.
BACKENDS: tuple[Backend, ...] = (_Native(), _OneDNN(), _Reference())
_CHOICES = ("native", "reference")  # the ones that run the same routes, so that either can be asked for


def explain_route(
    packed: Format | Layout,
    route: Route | None,
    device: torch.device,
    dtype: torch.dtype,
    no_kernels: str | None = None,
) -> list[tuple[Backend, str | None]]:
    """Return every backend with the reason why it does not run a weight by a route, or None.

    The first backend without a reason runs the weight.

    Args:
        packed: the weight.
        route: the route to run it by; None for a layout.
        device: of the inputs.
        dtype: of the inputs.
        no_kernels: the reason why native kernels cannot take these inputs, or None.
    """
    return [(backend, _why_not(backend, packed, route, device, dtype, no_kernels)) for backend in BACKENDS]


def _why_not(
    backend: Backend,
    packed: Format | Layout,
    route: Route | None,
    device: torch.device,
    dtype: torch.dtype,
    no_kernels: str | None,
) -> str | None:
    route = route.inner if isinstance(route, CompactRoute) else route
    reason = backend.supports(packed, route, device, dtype)
    if reason is not None or not _runs_a_layout(route):
        return reason
    wanted = chosen.get()[0]
    if wanted is not None and backend.name != wanted:
        return f"use({wanted!r}) is in force"
    return no_kernels if backend.name == "native" else None


def backend_for(
    packed: Format | Layout,
    route: Route | None,
    device: torch.device,
    dtype: torch.dtype,
    no_kernels: str | None = None,
) -> Backend:
    """Return the backend that runs a weight by a route.

    Raises:
        KernelError: no backend does. The message has the reason of each.
    """
    for backend in BACKENDS:
        if _why_not(backend, packed, route, device, dtype, no_kernels) is None:
            return backend
    found = explain_route(packed, route, device, dtype, no_kernels)
    listed = "; ".join(f"{backend.name}: {reason}" for backend, reason in found)
    what = "the layout" if route is None else f"the route {route}"
    raise KernelError(f"no backend runs {what} on this machine ({listed}). Use another one.")


def can_run(packed: Format, route: Route, x: Tensor) -> bool:
    """Return whether a backend runs a weight by a route for inputs like ``x``."""
    return any(reason is None for _, reason in explain_route(packed, route, x.device, x.dtype))


@torch.no_grad()
def prepare(packed: Format, route: Route, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Return a weight made ready for a route, by the first backend that supports it.

    Args:
        packed: the weight, whose tensors were checked.
        route: one of :func:`~secateur.kernels.candidates`.
        device: of the inputs.
        dtype: of the inputs.

    Raises:
        KernelError: the route does not fit the weight, or no backend runs it on this machine.
    """
    backend = backend_for(packed, route, device, dtype)
    if isinstance(route, CompactRoute):
        return route.around(_prepared_by(backend, route.compact(packed), route.inner, dtype), packed)
    return _prepared_by(backend, StoredWeight.of(packed), route, dtype)


def _prepared_by(backend: Backend, weight: StoredWeight, route: Route, dtype: torch.dtype) -> Prepared:
    """The matrix made ready. One without elements has nothing to lay out, and some libraries refuse it."""
    return backend.prepare(weight, route, dtype) if weight.values.numel() else _Nothing(len(weight.values))


def _runs_a_layout(route: Route | None) -> bool:
    return route is None or isinstance(route, LayoutRoute)


def _laid_out(weight: StoredWeight | Layout, route: Route | None) -> tuple[Layout, int, int]:
    """The layout, how many outputs the weight has, and the bytes that the layout takes besides the stored weight."""
    if isinstance(weight, Layout):
        return weight, weight.shape[0], 0
    assert isinstance(route, LayoutRoute)
    layout, shared = weight.lay_out(route)
    return layout, len(weight.values), layout.nbytes - shared


class _Nothing(Prepared):
    """A matrix without elements, such as the kept rows of a weight that is all zeros. The outputs are the bias."""

    nbytes = 0

    def __init__(self, out: int) -> None:
        self._out = out

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(len(x), self._out)
        return y if bias is None else y + bias.to(x.dtype)


class _NativeKernel(Prepared):
    any_shape = True

    def __init__(self, layout: Layout, out: int, nbytes: int) -> None:
        isa = chosen.get()[1] or _native_backend.default_isa()
        self._bound = _native_backend.Bound(layout, isa)
        self._out = out if out < layout.shape[0] else None
        self.nbytes = nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._out is not None:  # the layout has rows of zeros at the end; the bias has none for them
            y = self._bound(x.float().contiguous(), None)[..., : self._out].to(x.dtype)
            return y if bias is None else y + bias.to(x.dtype)
        if x.dtype is torch.float32:
            return self._bound(x.contiguous(), _as_float(bias))
        return self._bound(x.float().contiguous(), _as_float(bias)).to(x.dtype)

    def convolve(self, x: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        turned = in_channels_last(x)
        if not self._bound.takes_images or self._out is not None or (turned and window.picks_pixels):
            return super().convolve(x, bias, window)
        y = self._bound.convolve(x.float().contiguous(), _as_float(bias), window).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last) if turned else y


def _as_float(bias: Tensor | None) -> Tensor | None:
    if bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()):
        return bias
    return bias.float().contiguous()


class _ExpandedAtEachCall(Prepared):
    """Makes the weight dense at each call, so that no second copy of it stays in memory."""

    def __init__(self, layout: Layout, out: int, nbytes: int) -> None:
        self._layout, self._out, self.nbytes = layout, out, nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._out == self._layout.shape[0]:
            return self._layout.multiply(x, bias).to(x.dtype)
        y = self._layout.multiply(x, None)[:, : self._out].to(x.dtype)  # rows of zeros at the end have no bias
        return y if bias is None else y + bias.to(x.dtype)


class _Dense(Prepared):
    any_shape = True

    def __init__(self, weight: Tensor, shared: bool) -> None:
        self._weight = weight
        self.nbytes = 0 if shared else weight.nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight, None if bias is None else bias.to(x.dtype))

    def convolve(self, x: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        return _dense_convolution(x, self._weight, None if bias is None else bias.to(x.dtype), window)


def _dense_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    weight = weight.view(len(weight), x.shape[1], *window.kernel)
    return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation)


class _Prepacked(Prepared):
    """In oneDNN's own order, with products of numbers of a dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
        self._dtype = dtype
        self.nbytes = dtype.itemsize * weight.numel()

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(self._dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype).contiguous(), self._weight, bias, "none", [], ""
        )
        return y.to(x.dtype)


def available() -> dict[str, str]:
    """Return the state of every backend: "ok", or the reason why it cannot run on this machine.

    Returns:
        The states by name, in order of preference.

    Example:
        >>> from secateur import kernels
        >>> kernels.available()["reference"]
        'ok'
    """
    return {backend.name: backend.state() for backend in BACKENDS}


def has_kernels() -> bool:
    """Return whether native kernels run on this machine. Without them most routes are not worth measuring."""
    return available()["native"] == "ok"


def isas() -> list[str]:
    """Return the instruction sets that native kernels can use on this machine, best first; none if they cannot run.

    Example:
        >>> from secateur import kernels
        >>> set(kernels.isas()) <= {"avx512_vbmi2", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "generic"}
        True
    """
    return _native_backend.isas()


def current_isa() -> str | None:
    """Return the instruction set that native code uses now, or None where it cannot run or ``use`` forbids it."""
    backend, isa = chosen.get()
    if backend == "reference" or isinstance(load(), str):
        return None
    return isa or _native_backend.default_isa()


@contextmanager
def use(backend: str, *, isa: str | None = None) -> Iterator[None]:
    """Run only the named backend within a ``with`` block, and optionally one instruction set.

    It applies to the masks of ``SparseLinear`` and ``SparseConv2d``, too. It does not apply to the routes of dense
    arithmetic, which only one backend runs.

    Args:
        backend: "native" or "reference".
        isa: for native, one of :func:`isas`. None, the default, is the one that the environment variable SECATEUR_ISA
            names, or else the best.

    Raises:
        KernelError: the backend or instruction set does not exist, or cannot run on this machine.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> packed = kernels.BitmaskLayout.pack(torch.eye(4))
        >>> with kernels.use("reference"):
        ...     kernels.linear(torch.ones(1, 4), packed)
        tensor([[1., 1., 1., 1.]])
    """
    if backend not in _CHOICES:
        raise KernelError(
            f"there is no backend {backend!r} to choose; valid are {', '.join(_CHOICES)}. See kernels.available()."
        )
    state = available()[backend]
    if state != "ok":
        raise KernelError(f"the backend {backend!r} cannot run: {state}. Use {_CHOICES[-1]!r}.")
    if isa is not None and (backend != "native" or isa not in isas()):
        raise KernelError(
            f"the backend {backend!r} cannot run isa={isa!r}; native can run {', '.join(isas()) or 'none'} on this "
            "machine, and reference takes no isa. Leave isa out to get the best."
        )
    token = chosen.set((backend, isa))
    try:
        yield
    finally:
        chosen.reset(token)
