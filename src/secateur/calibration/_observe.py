"""Find out in forward passes which layers are called, and which weights are multiplied without that."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur.calibration._batches import Forward, call_model, code_path
from secateur.calibration._reads import FunctionWatch, Product
from secateur.layers import Observed, Reading, kinds_of

_Key: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


def key_of(matrix: Tensor) -> _Key:
    """Return what tells a view of a weight from other views: where it begins, its shape and its strides."""
    strides = tuple(s if n > 1 else 0 for s, n in zip(matrix.stride(), matrix.shape, strict=True))
    return matrix.data_ptr(), tuple(matrix.shape), strides


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_model,
    is_enough: Callable[[Observed], bool] = lambda observed: True,
) -> Observed:
    """Run a model on batches until enough was seen: on one batch of each structure, then on the others.

    Args:
        model: in the state that :func:`quiet` establishes.
        batches: what :func:`load_batches` returned; never changed.
        forward: how to call the model on a batch.
        is_enough: given what was seen so far, returns whether no further batch is needed.
    """
    batches = list(batches)
    first: dict[str, int] = {}
    for index, batch in enumerate(batches):
        first.setdefault(code_path(batch), index)
    others = [index for index in range(len(batches)) if index not in first.values()]
    observer = Observer(model)
    with observer.watching():
        for index in first.values():
            observer.run(batches[index], forward)
        for index in others:
            if is_enough(observer.observed()):
                break
            observer.run(batches[index], forward)
    return observer.observed()


class Observer:
    """Watches a model for the modules that are called and the weights that functions multiply.

    Args:
        model: whose structure must not change meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._called: set[int] = set()
        self._read: dict[int, Reading] = {}
        self._running: Counter[int] = Counter()
        self._parameters: dict[int, nn.Parameter] = {}  # by where their memory begins
        self._views: dict[_Key, tuple[nn.Parameter, bool]] = {}
        self._shown_by_call: dict[
            int, set[int]
        ] = {}  # by the id of a parameter, the modules whose calls show its input
        for module in model.modules():
            self._add(module)

    def _add(self, module: nn.Module) -> None:
        kinds = kinds_of(module)
        for kind in kinds:
            weight = getattr(module, kind.parameter, None)
            if not isinstance(weight, nn.Parameter) or not _has_memory(weight) or weight.ndim not in (2, 3):
                continue
            if kind.input_rows is not None or kind.call_rows is not None:
                self._shown_by_call.setdefault(id(weight), set()).add(id(module))
                if weight.ndim != 2:  # of a convolution
                    continue
            part = weight.detach() if kind.part is None else weight.detach()[kind.part]
            self._views.setdefault(key_of(kind.to_matrix(module, part)), (weight, False))
            self._parameters[weight.untyped_storage().data_ptr()] = weight
        if not kinds:
            for weight in module.parameters(recurse=False):
                if _has_memory(weight) and weight.ndim in (2, 3) and min(weight.shape) > 1:
                    self._add_unknown(weight)

    def _add_unknown(self, weight: nn.Parameter) -> None:
        """A parameter that no kind describes may be multiplied as it is or turned, whole or one matrix of a stack."""
        plain = weight.detach()
        self._parameters[weight.untyped_storage().data_ptr()] = weight
        for view in (plain, *(plain if plain.ndim == 3 else ())):
            self._views.setdefault(key_of(view), (weight, False))
            self._views.setdefault(key_of(view.mT), (weight, True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the block."""

        def begins(module: nn.Module, args: object) -> None:
            self._called.add(id(module))
            self._running[id(module)] += 1

        def ends(module: nn.Module, args: object, output: object) -> None:
            self._running[id(module)] -= 1

        with ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_pre_hook(begins).remove)
                stack.callback(module.register_forward_hook(ends, always_call=True).remove)
            stack.enter_context(FunctionWatch(self._note, self._is_weight))
            yield

    def run(self, batch: Any, forward: Forward) -> None:
        """Run the model once."""
        self._running.clear()
        forward(self._model, copy.deepcopy(batch))

    def observed(self) -> Observed:
        """Return what was seen so far."""
        return Observed(frozenset(self._called), dict(self._read))

    def _is_weight(self, tensor: Tensor) -> bool:
        return _has_memory(tensor) and tensor.untyped_storage().data_ptr() in self._parameters

    def _note(self, product: Product) -> None:
        matrix = product.matrix
        weight, is_transposed = self._views.get(key_of(matrix), (None, False))
        if weight is None and matrix.ndim == 3:  # a stack whose matrices are known one by one
            weight, is_transposed = self._views.get(key_of(matrix[0]), (None, False))
        if weight is None:
            weight = self._parameters[matrix.untyped_storage().data_ptr()]
            problem = f"{product.function} multiplies a part of it at a time"
        else:
            problem = ""
        if any(self._running[module] for module in self._shown_by_call.get(id(weight), ())):
            return  # the layer itself
        before = self._read.get(id(weight))
        if before is not None and not problem and before.is_transposed != is_transposed:
            problem = f"{before.function} and {product.function} multiply it, once turned"
        if before is None or (problem and not before.problem):
            self._read[id(weight)] = Reading(product.function, is_transposed, problem)


def _has_memory(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
