"""May a module be replaced by another one? If not, why? And the replacement itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from secateur._sharding import is_sharded
from secateur.layers._plain import own_behaviour


class Replaceability:
    """Whether the modules of one model may be replaced without changing what the model computes.

    Args:
        model: the one that has the modules. Its structure must not change while this object is used.
        instead: advice for a model that is itself a layer.
        reads_are_served: whether code that reads the weight of the replacement runs it, too.
    """

    def __init__(
        self, model: nn.Module, instead: str = "put it into a module", *, reads_are_served: bool = False
    ) -> None:
        self._model, self._instead = model, instead
        # Their fast paths read the weights of their children without calling these: a replacement would not run there.
        self._readers = {
            id(child): type(parent).__name__
            for parent in (() if reads_are_served else model.modules())
            if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
            for child in parent.children()
        }

    def why_not(self, module: nn.Module) -> str | None:
        """Return the reason why a module must not be replaced, or None."""
        if module is self._model:
            return f"a bare layer cannot be replaced in place; {self._instead}"
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            return "its weight is already sharded over processes; replace layers before fully_shard"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it has hooks, which a replacement would lose"
        if "forward" in vars(module):
            return "its forward was replaced on the object, which a replacement would lose"
        if (reason := own_behaviour(module)) is not None:
            return reason
        if (reader := self._readers.get(id(module))) is not None:
            return reads_without_calling(f"nn.{reader}")
        return None


def reads_without_calling(reader: str) -> str:
    """Return the reason to leave a layer unchanged whose parent reads its weight instead of calling the layer."""
    return f"{reader} reads its weight without calling it"


def swap_modules_(model: nn.Module, swaps: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace modules of a model at every place where the model has them.

    Args:
        model: changed in place.
        swaps: pairs of an old module and its replacement.
    """
    new = {id(old): replacement for old, replacement in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
