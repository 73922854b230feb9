"""Does a layer multiply its weight as it is? A subclass may scale it, normalise it or add to it first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.layers._kinds import registered_class, transposed_linear

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what has replacements
# What a subclass may define to compute, or to store, something else than its base class does. A forward is tried.
_TELLING = ("weight", "bias", "__call__", "_call_impl", "__getattr__", "__getattribute__")
_TRIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of PyTorch, or transformers' ``Conv1D``, that a module computes and stores the same as.

    It is the class of the module, or the base class of one that only adds a name. None for any other module.
    """
    return None if own_behaviour(module) is not None else _base_class(module)


def own_behaviour(module: nn.Module) -> str | None:
    """Return what a linear layer or convolution has that a replacement would lose, or None."""
    kind, base = type(module), _base_class(module)
    if base is None:
        return None
    own = {name for owner in kind.__mro__[: kind.__mro__.index(base)] for name in vars(owner)}
    if names := [name for name in _TELLING if name in own]:
        return f"{kind.__name__} has its own {names[0]}, unlike {base.__name__}, which a replacement would lose"
    held = [*module._parameters, *module._buffers, *module._modules]
    if extra := [name for name in held if name not in ("weight", "bias")]:
        return f"it has {extra[0]!r} besides weight and bias, which a replacement would lose"
    return why_not_plain(module)


def _base_class(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if base in (*_PLAIN, transposed_linear())), None)


def why_not_plain(module: nn.Module) -> str | None:
    """Return the reason why zeros in the weight of a layer may not be what the layer multiplies by, or None.

    A class of PyTorch is trusted, and so are subclasses that leave its forward alone. Any other subclass is tried: on
    two random inputs it must return what its base class would. What has parameters of its own cannot be tried, because
    these may be zero now and not later.
    """
    base = registered_class(module)
    forward = type(module).forward
    if base is None or forward is base.forward:
        return None
    if base not in (*_TRIED, transposed_linear()):
        return None  # a class that a user registered, and said so of its subclasses
    name = type(module).__name__
    more = [key for key, _ in module.named_parameters() if key not in {"weight", "bias"}]
    if more:
        return f"the forward of {name} may use {more[0]} besides its weight"
    weight: Any = module.weight
    if weight is None:  # it was tried before it was taken out
        return None
    if weight.is_meta:
        return f"{name} has a forward of its own, which cannot be tried without values"
    if not bool(weight.any()):
        return f"{name} has a forward of its own, which cannot be tried while its weight is zero"
    expected, found = _tried(module, base.forward), _tried(module, forward)
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or expected.shape != found.shape:
        return f"the forward of {name} does not return what {base.__name__} would"
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        return f"{name} does not multiply its weight as it is"
    return None


@torch.no_grad()
def _tried(module: nn.Module, forward: Any) -> Any:
    """What a forward function of the module's class returns for two random inputs; None if it fails on them."""
    inner: Any = module
    weight: Tensor = inner.weight
    generator = torch.Generator().manual_seed(0)
    if registered_class(module) is transposed_linear():
        shape: tuple[int, ...] = (2, weight.shape[0])
    elif isinstance(module, nn.Linear):
        shape = (2, weight.shape[1])
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(inner.dilation, inner.kernel_size, strict=True)]
        shape = (2, inner.in_channels, *(2 * n for n in reach))
    x = torch.randn(shape, generator=generator).to(weight)
    training = module.training
    module.training = False
    try:
        return forward(module, x)
    except Exception:
        return None
    finally:
        module.training = training
