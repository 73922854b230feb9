"""Whether a module may be replaced by another one, why not, and the replacement itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from secateur.layers._sharding import is_sharded


class Replaceability:
    """Says of the modules of one model whether they may be replaced without a change to what the model computes.

    Args:
        model: that the modules hang in; its structure must not change while this is used.
        instead: what to do with a model that is itself a bare layer.
    """

    def __init__(self, model: nn.Module, instead: str = "put it into a module") -> None:
        self._model, self._instead = model, instead
        self._readers = {
            id(child): type(parent).__name__
            for parent in model.modules()
            if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
            for child in parent.children()
        }

    def why_not(self, module: nn.Module) -> str | None:
        """Return the reason that a module must stay what it is, or None."""
        if module is self._model:
            return f"a bare layer cannot be replaced in place; {self._instead}"
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            return "its weight is sharded over processes already; replace layers before fully_shard"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it has hooks, which a replacement would lose"
        if "forward" in vars(module):
            return "its forward was replaced on the object, which a replacement would lose"
        if (reader := self._readers.get(id(module))) is not None:
            return reads_without_calling(f"nn.{reader}")
        return None


def reads_without_calling(reader: str) -> str:
    """Return the reason to leave a layer alone whose weight its parent reads, so that calls are not all that counts."""
    return f"{reader} reads its weight without calling it"


def swap_modules_(model: nn.Module, swaps: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace modules, given as pairs of old and new, wherever they hang in the model."""
    new = {id(old): replacement for old, replacement in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
