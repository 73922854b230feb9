"""Does a layer multiply its weight as it is? A subclass may scale it, normalise it or add to it first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.layers._kinds import registered_class, transposed_linear

_TRIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
