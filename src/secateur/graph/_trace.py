"""Run a model once and follow its channel labels through every operation of PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.graph._labels import Labels, Layer, Ledger
from secateur.graph._moves import MOVES
from secateur.graph._products import PRODUCTS
from secateur.graph._rules import Call, pointwise, unknown

_RULES = MOVES | PRODUCTS
NOT_FOLLOWED = "what it does to channels could not be followed"

_Key: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


class Trace:
    """The labels of a model's parameters and buffers, and of all that is computed from them while it is watched.

    Args:
        model: whose structure must not change meanwhile.
        joins_norms: whether a norm holds the channels that it is computed over together. Without that, those of a
            residual stream can be told apart, but to remove one changes the norm of the others.
    """

    def __init__(self, model: nn.Module, *, joins_norms: bool = True) -> None:
        self.ledger = Ledger()
        self.joins_norms = joins_norms
        self.atoms: dict[str, tuple[Layer, ...]] = {}  # of each tensor of the model, by name and dimension
        self._own: dict[int, Labels] = {}
        self._views: dict[_Key, Labels] = {}
        self._known = WeakTensorKeyDictionary()  # of Labels
        self.adapts = 0  # how many functions are running whose ranges follow the size of their input
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, str] = {}
        for name, tensor in tensors:
            if tensor is None or not isinstance(tensor, Tensor):
                continue
            if id(tensor) in names:
                self.atoms[name] = self.atoms[names[id(tensor)]]
                continue
            names[id(tensor)] = name
            self.atoms[name] = tuple(self.ledger.new(size) for size in tensor.shape)
            layers = [
                atoms.reshape([-1 if axis == dim else 1 for axis in range(tensor.ndim)])
                for dim, atoms in enumerate(self.atoms[name])
            ]
            labels = Labels(parametric=True, weak=not isinstance(tensor, nn.Parameter)).moved(layers)
            self._own[id(tensor)] = labels
            if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
                self._views[_key(tensor)] = labels

    def of(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor."""
        own = self._own.get(id(tensor))
        if own is not None:
            return own
        found: Labels | None = self._known.get(tensor)
        if found is not None:
            return found if all(layer.ndim == tensor.ndim for layer in found.layers) else Labels()
        # What `.data` returns is the parameter under another object, and is not dispatched.
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            return self._views.get(_key(tensor), Labels())
        return Labels()

    def set(self, tensor: Tensor, labels: Labels) -> None:
        """Say which labels a tensor has."""
        if id(tensor) not in self._own:
            self._known[tensor] = labels

    def is_known(self, tensor: Tensor) -> bool:
        """Whether anything was said of a tensor."""
        return id(tensor) in self._own or tensor in self._known

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow all operations until the end of the block."""
        with _Functions(self), _Operations(self):
            yield

    def close(self, outputs: object) -> None:
        """Say what the model returned: that has the size that its users expect."""
        for leaf in tree_leaves(_plain(outputs)):
            if isinstance(leaf, Tensor):
                for layer in self.of(leaf).layers:
                    self.ledger.fix(layer, "", "it is an output of the model")


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _plain(outputs: object) -> object:
    """Outputs of classes that are mappings but no dicts, such as those of transformers, as dicts."""
    return dict(outputs) if isinstance(outputs, Mapping) else outputs


class _Functions(TorchFunctionMode):
    """Tells which operations come from functions that cut a dimension into parts whatever its size."""

    _ADAPT = frozenset({"chunk", "tensor_split", "unbind", "unsafe_chunk"})

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        adapts = getattr(func, "__name__", "") in self._ADAPT
        self._trace.adapts += adapts
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._trace.adapts -= adapts


class _Operations(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        if before or isinstance(result, Tensor):
            _follow(self._trace, Call.of(func, args, kwargs, result))
        return result


def _follow(trace: Trace, call: Call) -> None:
    """Say what a call does to the labels of its tensors."""
    rule = _RULES.get(call.name) or (pointwise if call.is_pointwise else None)
    if rule is None:
        if call.outputs:
            unknown(trace, call)
        return
    try:
        rule(trace, call)
    except (
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        RuntimeError,
    ) as error:  # a call that the rule does not foresee
        unknown(trace, call, f"{NOT_FOLLOWED}: {error}")
