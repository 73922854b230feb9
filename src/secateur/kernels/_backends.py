"""Backends: what can run a route on this machine, which of them does, and why the others do not.

A backend is a class and its line in ``BACKENDS``. It says whether it supports a weight, a route, a device and a dtype,
with a reason if not, and makes the weight ready.
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
from secateur.kernels._dense import DenseRoute, PrepackedRoute
from secateur.kernels._layout import Layout
from secateur.kernels._load import load
from secateur.kernels._prepared import Prepared, StoredWeight
from secateur.kernels._route import LayoutRoute, Route

# The backend and the instruction set that `use` asks for, where it is in force.
chosen: ContextVar[tuple[str | None, str | None]] = ContextVar("secateur_backend", default=(None, None))


class Backend(ABC):
    """What runs some routes on some devices."""

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
            route: to run it by; None for a layout, which is a way of its own.
            device: of the inputs.
            dtype: of the inputs.
        """

    @abstractmethod
    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        """Make a weight ready for a route that is supported, for inputs of a dtype."""


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
            return f"there is no kernel for the route {route}"
        for what, where in (("x", device), ("the weight", packed.values.device)):
            if where.type != "cpu":
                return f"{what} is on {where}; the native kernels run on the processor"
        native = load()
        return native if isinstance(native, str) else None

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        layout, shared, out = _laid_out(weight, route)
        return _NativeKernel(layout, out, layout.nbytes - shared)


class _OneDNN(Backend):
    name = "onednn"

    def state(self) -> str:
        if not torch.backends.mkldnn.is_available():
            return "this PyTorch was built without oneDNN"
        if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
            return "this version of PyTorch keeps oneDNN's prepacked layers elsewhere"
        return "ok"

    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        if not isinstance(route, PrepackedRoute):
            return "it runs dense weights that are packed beforehand, nothing else"
        if device.type != "cpu":
            return f"x is on {device}; it runs on the processor"
        return None if self.state() == "ok" else self.state()

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        return _Prepacked(weight.to_dense())


class _Reference(Backend):
    name = "reference"

    def state(self) -> str:
        return "ok"

    def supports(
        self, packed: Format | Layout, route: Route | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        return "only onednn packs dense weights beforehand" if isinstance(route, PrepackedRoute) else None

    def prepare(self, weight: StoredWeight | Layout, route: Route | None, dtype: torch.dtype) -> Prepared:
        if isinstance(route, DenseRoute):
            dense = weight.to_dense()
            stored = isinstance(weight, StoredWeight) and dense.data_ptr() == weight.owner.data_ptr()
            return _Dense(dense.to(dtype), shared=stored and dense.dtype == dtype)
        layout, shared, out = _laid_out(weight, route)
        return _ExpandedAtEachCall(layout, out, layout.nbytes - shared)


# In order of preference.
BACKENDS: tuple[Backend, ...] = (_Native(), _OneDNN(), _Reference())
_CHOICES = ("native", "reference")  # those that run the same routes


def explain_route(
    packed: Format | Layout,
    route: Route | None,
    device: torch.device,
    dtype: torch.dtype,
    no_kernels: str | None = None,
) -> list[tuple[Backend, str | None]]:
    """Return every backend with the reason why it does not run a weight by a route; the first without one runs it.

    Args:
        packed: the weight.
        route: to run it by; None for a layout.
        device: of the inputs.
        dtype: of the inputs.
        no_kernels: a further reason against native kernels, that lies in the inputs.
    """
    route = route.inner if isinstance(route, CompactRoute) else route
    wanted = chosen.get()[0]
    found = []
    for backend in BACKENDS:
        reason = backend.supports(packed, route, device, dtype)
        if reason is None and _runs_a_layout(route):
            if wanted is not None and backend.name != wanted:
                reason = f"use({wanted!r}) is in force"
            elif backend.name == "native":
                reason = no_kernels
        found.append((backend, reason))
    return found


def backend_for(
    packed: Format | Layout,
    route: Route | None,
    device: torch.device,
    dtype: torch.dtype,
    no_kernels: str | None = None,
) -> Backend:
    """Return the backend that runs a weight by a route.

    Raises:
        KernelError: none does; with every backend's reason.
    """
    found = explain_route(packed, route, device, dtype, no_kernels)
    for backend, reason in found:
        if reason is None:
            return backend
    listed = "; ".join(f"{backend.name}: {reason}" for backend, reason in found)
    raise KernelError(
        f"no backend runs {'the layout' if route is None else f'the route {route}'} here ({listed}). Use another one."
    )


def can_run(packed: Format, route: Route, x: Tensor) -> bool:
    """Return whether some backend runs a weight by a route for inputs like ``x``."""
    return any(reason is None for _, reason in explain_route(packed, route, x.device, x.dtype))


@torch.no_grad()
def prepare(packed: Format, route: Route, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Make a weight ready for a route, by the first backend that supports it.

    Args:
        packed: the weight, checked.
        route: one of :func:`~secateur.kernels.candidates`.
        device: of the inputs.
        dtype: of the inputs.

    Raises:
        KernelError: a route that does not fit the weight, or that no backend runs here.
    """
    backend = backend_for(packed, route, device, dtype)
    if isinstance(route, CompactRoute):
        return route.around(backend.prepare(route.compact(packed), route.inner, dtype), packed)
    return backend.prepare(StoredWeight.of(packed), route, dtype)


def _runs_a_layout(route: Route | None) -> bool:
    return route is None or isinstance(route, LayoutRoute)


def _laid_out(weight: StoredWeight | Layout, route: Route | None) -> tuple[Layout, int, int]:
    """The layout, the bytes of it that are the stored weight's own memory, and the outputs that count."""
    if isinstance(weight, Layout):
        return weight, 0, weight.shape[0]
    assert isinstance(route, LayoutRoute)
    return *weight.lay_out(route), len(weight.values)


class _NativeKernel(Prepared):
    def __init__(self, layout: Layout, out: int, nbytes: int) -> None:
        isa = chosen.get()[1] or _native_backend.default_isa()
        self._bound = _native_backend.Bound(layout, isa)
        self._out = out if out < layout.shape[0] else None
        self.nbytes = nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._out is not None:  # the layout has rows of zeros below
            y = self._bound(x.float().contiguous(), None)[:, : self._out].to(x.dtype)
            return y if bias is None else y + bias.to(x.dtype)
        if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
            bias = bias.float().contiguous()
        if x.dtype is torch.float32:
            return self._bound(x.contiguous(), bias)
        return self._bound(x.float().contiguous(), bias).to(x.dtype)


class _ExpandedAtEachCall(Prepared):
    """Needs no second copy of the weight beyond a call: to compare with, and for gradients."""

    def __init__(self, layout: Layout, out: int, nbytes: int) -> None:
        self._layout, self._out, self.nbytes = layout, out, nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._layout.to_dense()[: self._out].to(x.device)
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


class _Dense(Prepared):
    def __init__(self, weight: Tensor, shared: bool) -> None:
        self._weight = weight
        self.nbytes = 0 if shared else weight.nbytes

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight, None if bias is None else bias.to(x.dtype))


class _Prepacked(Prepared):
    """float32 always, for which processors have the arithmetic."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), None)
        self.nbytes = 4 * weight.numel()

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.float()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.float().contiguous(), self._weight, bias, "none", [], "")
        return y.to(x.dtype)


def available() -> dict[str, str]:
    """Every backend, and "ok" or the reason why it cannot run here.

    Returns:
        Name to state, in order of preference.

    Example:
        >>> from secateur import kernels
        >>> kernels.available()["reference"]
        'ok'
    """
    return {backend.name: backend.state() for backend in BACKENDS}


def has_kernels() -> bool:
    """Return whether native kernels run here; without them only the routes of dense arithmetic are candidates."""
    return available()["native"] == "ok"


def isas() -> list[str]:
    """Instruction sets the native kernels can use on this machine, best first; empty if they cannot run.

    Example:
        >>> from secateur import kernels
        >>> set(kernels.isas()) <= {"avx512", "avx2", "generic"}
        True
    """
    return _native_backend.isas()


def current_isa() -> str | None:
    """Return the instruction set of native code here and now, or None where it cannot or must not run."""
    backend, isa = chosen.get()
    if backend == "reference" or isinstance(load(), str):
        return None
    return isa or _native_backend.default_isa()


@contextmanager
def use(backend: str, *, isa: str | None = None) -> Iterator[None]:
    """Run only the named backend within a `with` block, and optionally one instruction set.

    The masks of ``SparseLinear`` and ``SparseConv2d`` heed it too. Routes that only one backend runs, those of dense
    arithmetic, run as ever.

    Args:
        backend: "native" or "reference".
        isa: for native, one of :func:`isas`; default the best, or what the variable SECATEUR_ISA names.

    Raises:
        KernelError: the backend or instruction set does not exist or cannot run here.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> packed = kernels.BitmaskLayout.pack(torch.eye(4))
        >>> with kernels.use("reference"):
        ...     kernels.linear(torch.ones(1, 4), packed)
        tensor([[1., 1., 1., 1.]])
    """
    if backend not in _CHOICES:
        raise KernelError(f"there is no backend {backend!r}; expected one of {', '.join(_CHOICES)}. See available().")
    state = available()[backend]
    if state != "ok":
        raise KernelError(f"backend {backend!r} cannot run: {state}. Use {_CHOICES[-1]!r}.")
    if isa is not None and (backend != "native" or isa not in isas()):
        raise KernelError(
            f"isa={isa!r} with backend {backend!r}: only native takes one, of {', '.join(isas())} on this machine. "
            "Leave isa out to get the best."
        )
    token = chosen.set((backend, isa))
    try:
        yield
    finally:
        chosen.reset(token)
