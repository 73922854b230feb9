"""Find out in forward passes which layers are called, and which weights are multiplied without that."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur.calibration._batches import Forward, call_model, code_path
from secateur.calibration._reads import FunctionWatch, Product
from secateur.layers import Observed, Reading, is_sharded, kinds_of

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
        self._views: dict[_Key, tuple[nn.Parameter, Reading]] = {}
        # By the id of a parameter: the blocks of rows that functions multiply, and whether they multiply all of it.
        self._rows: dict[int, set[tuple[int, int]]] = {}
        self._whole: set[int] = set()
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
            self._views.setdefault(key_of(kind.to_matrix(module, part)), (weight, Reading("")))
            self._parameters[weight.untyped_storage().data_ptr()] = weight
        if not kinds:
            for weight in module.parameters(recurse=False):
                if _has_memory(weight) and weight.ndim in (2, 3) and min(weight.shape) > 1:
                    self._add_unknown(weight)

    def _add_unknown(self, weight: nn.Parameter) -> None:
        """A parameter that no kind describes may be multiplied as it is or turned, whole or one matrix of a stack."""
        plain = weight.detach()
        self._parameters[weight.untyped_storage().data_ptr()] = weight
        views: list[tuple[Tensor, int | None]] = [(plain, None)]
        if plain.ndim == 3:
            views += [(matrix, None) for matrix in plain] + [
                (plain.flatten(first, first + 1), first) for first in (0, 1)
            ]
        for view, joined in views:
            self._views.setdefault(key_of(view), (weight, Reading("", joined=joined)))
            self._views.setdefault(key_of(view.mT), (weight, Reading("", is_transposed=True, joined=joined)))

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
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and cannot be pruned
                    continue
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
        read = dict(self._read)
        for parameter in self._parameters.values():
            if id(parameter) in self._rows:
                read[id(parameter)] = self._in_parts(read[id(parameter)], parameter)
        return Observed(frozenset(self._called), read)

    def _in_parts(self, reading: Reading, parameter: nn.Parameter) -> Reading:
        """How a parameter is read of which functions multiply some rows at a time: in blocks apart, or not at all."""
        ranges = sorted(self._rows[id(parameter)])
        if id(parameter) in self._whole:
            return replace(reading, problem=f"{reading.function} multiplies all of it, and parts of it")
        size = ranges[0][1] - ranges[0][0]
        if len(parameter) % size == 0 and all(begin % size == 0 and end - begin == size for begin, end in ranges):
            # Blocks of one size, such as experts. Those that no token has reached yet are among them.
            ranges = [(begin, begin + size) for begin in range(0, len(parameter), size)]
        is_apart = all(end == begin for (_, end), (begin, _) in pairwise(ranges))
        if reading.problem or not is_apart or (ranges[0][0], ranges[-1][1]) != (0, len(parameter)):
            return replace(
                reading, problem=reading.problem or f"{reading.function} multiplies parts of it that overlap"
            )
        return replace(reading, parts=tuple(ranges))

    def _is_weight(self, tensor: Tensor) -> bool:
        return _has_memory(tensor) and tensor.untyped_storage().data_ptr() in self._parameters

    def _note(self, product: Product) -> None:
        matrix = product.matrix
        known = self._views.get(key_of(matrix))
        if known is None and matrix.ndim == 3:  # a stack whose matrices are known one by one
            known = self._views.get(key_of(matrix[0]))
        weight = self._parameters[matrix.untyped_storage().data_ptr()] if known is None else known[0]
        if any(self._running[module] for module in self._shown_by_call.get(id(weight), ())):
            return  # the layer itself
        before = self._read.get(id(weight))
        reading = replace(known[1] if known is not None else self._some_rows(matrix, weight), function=product.function)
        if known is not None and weight.ndim == 2:
            self._whole.add(id(weight))
        if before is None:
            self._read[id(weight)] = reading
        elif not before.problem and (reading.problem or replace(reading, function=before.function) != before):
            problem = reading.problem or f"{before.function} and {reading.function} multiply it in different ways"
            self._read[id(weight)] = replace(before, problem=problem)

    def _some_rows(self, matrix: Tensor, weight: nn.Parameter) -> Reading:
        """How rows of a parameter were read that are not the whole of it."""
        plain = weight.detach()
        row = plain.stride(0)
        begin, rest = divmod(int(matrix.storage_offset()) - int(plain.storage_offset()), int(row) or 1)
        if plain.ndim == 2 and matrix.ndim == 2 and not rest:
            for is_transposed, rows in ((False, matrix), (True, matrix.mT)):
                if rows.stride() == plain.stride() and rows.shape[1] == plain.shape[1]:
                    self._rows.setdefault(id(weight), set()).add((begin, begin + len(rows)))
                    return Reading("", is_transposed)
        return Reading("", problem="a function multiplies a part of it")


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that views can be told by: no sparse, absent or sharded one has."""
    is_plain = isinstance(tensor, Tensor) and not is_sharded(tensor) and tensor.layout == torch.strided
    return is_plain and not tensor.is_meta
