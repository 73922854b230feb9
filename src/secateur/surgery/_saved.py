"""The values of tensors that are about to change, to put them back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.layers import Layer


class Saved:
    """Keeps values of tensors until :meth:`restore`."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of tensors, if they are not kept already."""
        for tensor in tensors:
            self._values.setdefault(id(tensor), (tensor, tensor.detach().clone()))

    def keep_layers(self, layers: Iterable[Layer]) -> None:
        """Keep the weights of layers, and the other parameters of their modules."""
        for layer in layers:
            self.keep([layer.parameter, *(p for m in layer.modules for p in m.parameters(recurse=False))])

    def keep_module(self, module: nn.Module) -> None:
        """Keep all parameters of a module."""
        self.keep(module.parameters())

    @torch.no_grad()
    def restore(self) -> None:
        """Put all values back."""
        for tensor, value in self._values.values():
            if tensor.shape == value.shape and not torch.equal(tensor, value):
                tensor.copy_(value)
