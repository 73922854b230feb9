"""The public functions: multiply by a packed weight, and explain which backend does it."""

from __future__ import annotations

from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.formats import Format
from secateur.kernels._backends import backend_for, explain_route
from secateur.kernels._layout import Layout
from secateur.kernels._operator import PackedSpec, check_bias, check_input, packed_linear, route_for
from secateur.kernels._plan import RoutePlan, default_plan


@runtime_checkable
class PackedModule(Protocol):
    """A module with a packed weight, such as :class:`secateur.PackedLinear`."""

    @property
    def packed(self) -> Format:
        """The weight."""

    @property
    def plan(self) -> RoutePlan:
        """Which route to take for how many input rows."""


@overload
def explain(x: Tensor, packed: Layout | Format | PackedModule) -> list[tuple[str, str]]: ...


@overload
def explain(x: Tensor, packed: nn.Module) -> list[tuple[str, str]] | dict[str, list[tuple[str, str]]]: ...


def explain(
    x: Tensor, packed: Layout | Format | PackedModule | nn.Module
) -> list[tuple[str, str]] | dict[str, list[tuple[str, str]]]:
    """Return which backend multiplies x by a packed weight, and why the others do not.

    Args:
        x: ``[..., in]``. For a whole model: any input with as many rows as its layers will get.
        packed: a layout, a weight in a storage format, a packed layer, or a model with packed layers.

    Returns:
        Pairs of a backend and "ok" or a reason, in order of preference. The first with "ok" is used. A backend that
        cannot be loaded is listed, too. For a format or a packed layer, "ok" is followed by the route that its plan
        takes, such as "ok: panels:128x256". For a model, a dict of such lists by the qualified name of the layer.

    Raises:
        TypeError: ``packed`` is none of these, or a model without packed layers.

    Example:
        >>> import torch, secateur
        >>> from secateur import kernels
        >>> packed = kernels.BitmaskLayout.pack(torch.eye(4))
        >>> kernels.explain(torch.ones(1, 4, device="meta"), packed)[0]
        ('native', 'x is on meta; the native kernels run on the CPU')
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(torch.nn.Linear(4, 4), plan="dense"))
        >>> kernels.explain(torch.ones(1, 4), model)["0"][-1]
        ('reference', 'ok: dense')
    """
    if isinstance(packed, Layout):
        found = explain_route(packed, None, x.device, x.dtype, _records_gradient(x))
        return [(backend.name, reason or backend.state()) for backend, reason in found]
    if isinstance(packed, Format):
        return _explain(x, packed, default_plan(packed))
    if isinstance(packed, PackedModule):
        return _explain(x, packed.packed, packed.plan)
    if not isinstance(packed, nn.Module):
        raise TypeError(f"packed must be a layout, a format, a packed layer or a model, got {type(packed).__name__}")
    layers: dict[str, PackedModule] = {}
    for name, module in packed.named_modules():
        # A packed convolution has a packed linear layer inside, which is not listed a second time.
        if isinstance(module, PackedModule) and name.rpartition(".")[0] not in layers:
            layers[name] = module
    if not layers:
        raise TypeError(f"the {type(packed).__name__} has no packed layers. Pack it first: secateur.pack_(model).")
    return {name: _explain(x, module.packed, module.plan) for name, module in layers.items()}


def _explain(x: Tensor, packed: Format, plan: RoutePlan) -> list[tuple[str, str]]:
    route = route_for(plan, x)
    found = explain_route(packed, route, x.device, x.dtype)
    return [(backend.name, reason or f"{backend.state()}: {route}") for backend, reason in found]


def _records_gradient(x: Tensor, bias: Tensor | None = None) -> str | None:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return "x or the bias requires a gradient, which the native kernels do not record"
    return None


def linear(
    x: Tensor, packed: Layout | Format, bias: Tensor | None = None, plan: RoutePlan | str | None = None
) -> Tensor:
    """Return y = x Wᵀ + b for a packed weight W.

    Sums are float32. An x of another floating dtype is converted, and the result has the dtype of x. The result of
    native kernels does not depend on the number of threads. Whether a zero of the weight is multiplied depends on the
    layout; this makes a difference only where x has an infinity or NaN.

    The native kernels run where :func:`explain` says so. Otherwise the weight is made dense for the call. An x that
    requires a gradient gets one.

    Args:
        x: ``[..., in]``, floating point.
        packed: the weight, ``[out, in]``, in a layout of this module or a format of :mod:`secateur.formats`. The layout
            of a format is made at the first call, and kept as long as the tensors of the format exist.
        bias: ``[out]``, or None.
        plan: for a format: which route to take for how many input rows. None for the route that the format was made
            for.

    Returns:
        ``[..., out]``, in the dtype of x.

    Raises:
        KernelError: x, the bias or the plan does not fit the weight, or this machine cannot run the instruction set
            that SECATEUR_ISA names.
        TypeError: a packed weight that is neither a layout nor a format, or an x that is not floating point.

    Example:
        >>> import torch
        >>> from secateur import kernels
        >>> packed = kernels.PanelLayout.pack(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
        >>> kernels.linear(torch.tensor([1.0, 2.0, 3.0]), packed, torch.tensor([0.5, 0.0]))
        tensor([ 4.5000, 10.0000])
    """
    if isinstance(packed, Format):
        tensors = packed.tensors()
        plan = default_plan(packed) if plan is None else RoutePlan.parse(str(plan))
        spec = PackedSpec(type(packed), packed.pattern, packed.shape, tuple(tensors), plan)
        return packed_linear(x, list(tensors.values()), bias, str(spec))
    if not isinstance(packed, Layout):
        raise TypeError(
            f"packed must be a layout of secateur.kernels or a format of secateur.formats, got {type(packed).__name__}"
        )
    if plan is not None:
        raise TypeError("a layout is run by its own kernel and takes no plan; give a format, or no plan")
    rows, columns = packed.shape
    check_input(x, columns)
    check_bias(bias, rows, x.device)
    backend = backend_for(packed, None, x.device, x.dtype, _records_gradient(x, bias))
    prepared = backend.prepare(packed, None, x.dtype)
    return prepared.run(x.reshape(-1, columns), bias).reshape(*x.shape[:-1], rows)
