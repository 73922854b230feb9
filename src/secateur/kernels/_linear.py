"""The public door: multiply by a packed weight, and say what does it."""

from __future__ import annotations

from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur.formats import Format
from secateur.kernels._backends import backend_for, explain_route
from secateur.kernels._layout import Layout
from secateur.kernels._operator import PackedSpec, packed_linear, route_for
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
    """Say which backend runs x with this weight: the first that says "ok"; the others say why not.

    Args:
        x: ``[..., in]``; of a whole model, any input with as many rows as its layers will see.
        packed: a layout, a weight in its storage format, a packed layer, or a model with packed layers.

    Returns:
        (backend, "ok" or reason) in order of preference. A backend that cannot load stays listed. Of a packed layer the
        "ok" is followed by the route that its plan takes: "ok: panels:128x256". Of a model, a dict of such lists by the
        qualified name of the packed layer.

    Raises:
        TypeError: neither of these, or a model without packed layers.

    Example:
        >>> import torch, secateur
        >>> from secateur import kernels
        >>> packed = kernels.BitmaskLayout.pack(torch.eye(4))
        >>> kernels.explain(torch.ones(1, 4, device="meta"), packed)[0]
        ('native', 'x is on meta; the native kernels run on the processor')
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
        if isinstance(module, PackedModule) and name.rpartition(".")[0] not in layers:  # not the inside of another
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
    """y = x Wᵀ + b for a packed weight W.

    Sums are float32; an x of another floating type is converted and the result has its type. The native kernels give
    the same result for any number of threads. Whether a zero of the weight is multiplied depends on the layout, which
    matters only for an x that holds an infinity or NaN.

    The native kernels run where :func:`explain` says so, otherwise the weight is made dense for the call. An x that
    requires a gradient gets one.

    Args:
        x: [..., in], floating point.
        packed: the weight, [out, in], in one of the layouts of this module or one of the formats of
            :mod:`secateur.formats`. What runs a format is made at the first call and kept as long as its tensors live.
        bias: [out] or None.
        plan: for a format, which route to take for how many input rows; None for what the format was made for.

    Returns: [..., out], x's type.

    Raises:
        KernelError: a size that does not fit the weight, a plan that does not, or a SECATEUR_ISA this machine cannot
            run.
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
        raise TypeError(f"packed must be a layout of secateur.kernels, got {type(packed).__name__}")
    if plan is not None:
        raise TypeError("a layout is run by its own kernel: a plan goes with a format")
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
    backend = backend_for(packed, None, x.device, x.dtype, _records_gradient(x, bias))
    prepared = backend.prepare(packed, None, x.dtype)
    return prepared.run(x.reshape(-1, columns), bias).reshape(*x.shape[:-1], rows)
