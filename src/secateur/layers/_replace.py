"""Put other modules in the place of a model's own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def swap_modules_(model: nn.Module, swaps: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace modules wherever they hang in the model."""
    new = {id(old): replacement for old, replacement in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
