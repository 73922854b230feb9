"""y = x W^T + b for a weight that is packed: native kernels where they can run, and a reference that always can.

>>> import torch
>>> from secateur import kernels
>>> weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
>>> packed = kernels.BitmaskLayout.pack(weight)
>>> kernels.linear(torch.tensor([[1.0, 10.0]]), packed)
tensor([[20.,  3.]])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.kernels import _native_backend as _native_code
from secateur.kernels._layouts import Layout
from secateur.kernels._load import load

_BACKENDS = ("native", "reference")

_chosen: ContextVar[tuple[str | None, str | None]] = ContextVar("secateur_backend", default=(None, None))


def available() -> dict[str, str]:
    """Every backend, and "ok" or the reason why it cannot run here.

    Returns: name to state, in order of preference.

    Example:
        >>> from secateur import kernels
        >>> kernels.available()["reference"]
        'ok'
    """
    return {backend: _state(backend) for backend in _BACKENDS}


def _state(backend: str) -> str:
    if backend == "reference":
        return "ok"
    native = load()
    if isinstance(native, str):
        return native
    try:
        _native_code.default_isa()
    except KernelError as error:
        return str(error)
    return "ok"


def isas() -> list[str]:
    """Instruction sets the native kernels can use on this machine, best first; empty if they cannot run.

    Example:
        >>> from secateur import kernels
        >>> set(kernels.isas()) <= {"avx512", "avx2", "generic"}
        True
    """
    return _native_code.isas()


def explain(x: Tensor, packed: Layout) -> list[tuple[str, str]]:
    """Which backend runs x [..., in] with this weight: the first that says "ok"; the others say why not.

    Returns: (backend, "ok" or reason) in order of preference. A backend that cannot load stays listed.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> packed = kernels.BitmaskLayout.pack(torch.eye(4))
        >>> kernels.explain(torch.ones(1, 4, device="meta"), packed)[0]
        ('native', 'x is on meta; the native kernels run on the processor')
    """
    return [(backend, _reason(backend, x, packed) or _state(backend)) for backend in _BACKENDS]


def _reason(backend: str, x: Tensor, packed: Layout, bias: Tensor | None = None) -> str | None:
    """Why the backend cannot take these tensors, or None."""
    chosen, _ = _chosen.get()
    if chosen is not None and backend != chosen:
        return f"use({chosen!r}) is in force"
    if backend == "reference":
        return None
    if not x.is_cpu or not packed.values.is_cpu:
        where = x.device if not x.is_cpu else packed.values.device
        return f"{'x' if not x.is_cpu else 'the weight'} is on {where}; the native kernels run on the processor"
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return "x or the bias requires a gradient, which the native kernels do not record"
    native = load()
    return native if isinstance(native, str) else None


@contextmanager
def use(backend: str, *, isa: str | None = None) -> Iterator[None]:
    """Run only the named backend within a `with` block, and optionally one instruction set.

    The masks of ``SparseLinear`` and ``SparseConv2d`` heed it too.

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
    if backend not in _BACKENDS:
        raise KernelError(f"there is no backend {backend!r}; expected one of {', '.join(_BACKENDS)}. See available().")
    state = _state(backend)
    if state != "ok":
        raise KernelError(f"backend {backend!r} cannot run: {state}. Use {_BACKENDS[-1]!r}.")
    if isa is not None and (backend != "native" or isa not in isas()):
        raise KernelError(
            f"isa={isa!r} with backend {backend!r}: only native takes one, of {', '.join(isas())} on this machine. "
            "Leave isa out to get the best."
        )
    token = _chosen.set((backend, isa))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_isa() -> str | None:
    """The instruction set of native code here and now, or None where it cannot or must not run."""
    backend, isa = _chosen.get()
    if backend == "reference" or isinstance(load(), str):
        return None
    return isa or _native_code.default_isa()


def linear(x: Tensor, packed: Layout, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for a packed weight W.

    Sums are float32; an x of another floating type is converted and the result has its type. The native kernels give
    the same result for any number of threads. Whether a zero of the weight is multiplied depends on the layout, which
    matters only for an x that holds an infinity or NaN.

    The native kernels run where :func:`explain` says so, otherwise the weight is made dense for the call. An x that
    requires a gradient gets one, through that reference.

    Args:
        x: [..., in], floating point.
        packed: the weight, [out, in], in one of the layouts of this module.
        bias: [out] or None.

    Returns: [..., out], x's type.

    Raises:
        KernelError: a size that does not fit the weight, or a SECATEUR_ISA this machine cannot run.
        TypeError: a packed weight that is not a layout, or an x that is not floating point.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> packed = kernels.PanelLayout.pack(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
        >>> kernels.linear(torch.tensor([1.0, 2.0, 3.0]), packed, torch.tensor([0.5, 0.0]))
        tensor([ 4.5000, 10.0000])
    """
    if not isinstance(packed, Layout):
        raise TypeError(f"packed must be a layout of secateur.kernels, got {type(packed).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    rows, columns = packed.shape
    if not x.dim() or x.shape[-1] != columns:
        raise KernelError(
            f"x has shape {tuple(x.shape)}, the packed weight takes {columns} inputs; x must be [..., {columns}]. "
            "Check that x belongs to this layer."
        )
    if bias is not None and bias.shape != (rows,):
        raise KernelError(
            f"the bias has shape {tuple(bias.shape)}, the packed weight has {rows} outputs; it must be [{rows}]. "
            "Check that the bias belongs to this layer."
        )
    flat = x.reshape(-1, columns).to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32)
    if _reason("native", x, packed, bias) is None:
        bias = None if bias is None else bias.detach().contiguous()
        isa = _chosen.get()[1] or _native_code.default_isa()
        y = _native_code.linear(flat.detach().contiguous(), packed, bias, isa)
    else:
        y = torch.nn.functional.linear(flat, packed.to_dense().to(x.device), bias)
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)
