"""Masks of layers that are read instead of called: ``F.linear(x, self.qkv.weight)`` must see the mask, too.

The first forward pass shows which layers are read like that, and by which modules. From then on their weight is the
effective one while such a module runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from secateur.nn import SparseLayer, sparse_layers


class ServedReads:
    """Serves the reads of sparse layers in a model, from its second forward pass on, until :meth:`release`.

    A copy of the model serves what was found out before it was made.

    Args:
        model: that has the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names: dict[str, list[str]] = {}  # by the module that reads, the layers; empty until the pass has ended
        self._watch: _Reads | None = None
        self._is_copy = False
        self._handles = [
            model.register_forward_pre_hook(self._begins),
            model.register_forward_hook(self._ends, always_call=True),
        ]

    def release(self) -> None:
        """Remove all hooks."""
        if self._watch is not None:
            self._watch.remove()
        self._clear()

    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedReads:
        return _copied()

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, ()

    def _begins(self, model: nn.Module, args: object) -> None:
        if self._is_copy or torch.compiler.is_compiling():
            return
        if self._watch is not None:  # of a pass that failed
            self._watch.remove()
        self._watch = _Reads(model)
        self._watch.__enter__()  # type: ignore[no-untyped-call]

    def _ends(self, model: nn.Module, args: object, output: object) -> None:
        if self._watch is None:
            return
        self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # it failed, perhaps, and then PyTorch takes no change of the hooks; the next pass will do
            return
        names = {id(module): name for name, module in model.named_modules()}
        found = {names[id(reader)]: [names[id(layer)] for layer in read] for reader, read in self._watch.found.items()}
        self.serve(found)

    def serve(self, names: Mapping[str, Sequence[str]]) -> None:
        """Serve these reads from now on, as an earlier first pass found them.

        Args:
            names: by the name of a module that reads, the names of the layers.
        """
        if self._watch is not None:
            self._watch.remove()
        self._clear()
        self._watch, self.names = None, {reader: list(read) for reader, read in names.items()}
        for name, read in self.names.items():
            reader = self._model.get_submodule(name)
            serving = _Serving(
                layer for path in read if isinstance(layer := self._model.get_submodule(path), SparseLayer)
            )
            self._handles += [
                reader.register_forward_pre_hook(serving.begins),
                reader.register_forward_hook(serving.ends, always_call=True),
            ]


def _copied() -> ServedReads:
    """What the hooks of the first pass belong to in a copy of the model: they do nothing there."""
    made = ServedReads.__new__(ServedReads)
    made._watch, made._is_copy, made._handles, made.names = None, True, [], {}
    return made


class _Serving:
    """Hooks of a module that reads sparse layers: while it runs, their weight is the effective one."""

    def __init__(self, layers: Iterable[SparseLayer]) -> None:
        self._layers = tuple(layers)

    def begins(self, module: nn.Module, args: object) -> None:
        for layer in self._layers:
            layer.count_readers(1)

    def ends(self, module: nn.Module, args: object, output: object) -> None:
        for layer in self._layers:
            layer.count_readers(-1)


class _Reads(TorchFunctionMode):
    """Notes which modules hand the weights of sparse layers to functions that compute with them.

    Attributes:
        found: by module, the layers that it reads.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[nn.Module, dict[SparseLayer, None]] = {}
        self._owners = {id(layer.weight): layer for layer in sparse_layers(model).values()}
        self._running = [model]  # whose own hooks come too late for its beginning
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._begins),
                module.register_forward_hook(self._ends, always_call=True),
            ]

    def _begins(self, module: nn.Module, args: object) -> None:
        self._running.append(module)
        if isinstance(module, SparseLayer):  # runs as without the mode, to the bit
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _ends(self, module: nn.Module, args: object, output: object) -> None:
        self._running.remove(module)
        if isinstance(module, SparseLayer):
            self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the reader, and call the function."""
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        owners = [self._owners[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in self._owners]
        if owners and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for owner in owners:
                if owner not in self._running:
                    self.found.setdefault(self._running[-1], {})[owner] = None
        return result

    def remove(self) -> None:
        """Remove the hooks that know which modules run."""
        for handle in self._handles:
            handle.remove()
