"""What each operation of PyTorch does to channel labels: one rule for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.graph._labels import Labels, Layer, Ledger, aligned


class Tracing(Protocol):
    """What rules may know and say."""

    ledger: Ledger
    joins_norms: bool
    adapts: int

    def of(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor."""

    def set(self, tensor: Tensor, labels: Labels) -> None:
        """Say which labels a tensor has."""


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Args:
        operation: such as ``aten.add``.
        name: such as ``add``: without the underscore of operations that change their input.
        given: arguments by their name.
        result: what it returned.
        is_pointwise: whether it computes each entry of its result from the entries at the same place.
        changes_input: whether its result is its first argument.
    """

    operation: str
    name: str
    given: Mapping[str, Any]
    result: Any
    is_pointwise: bool
    changes_input: bool

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Call:
        """Return a call as the dispatcher sees it."""
        schema = func._schema
        values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        given = {
            argument.name: values.get(argument.name, argument.default_value)
            for argument in schema.arguments
            if argument.name in values or argument.has_default_value()
        }
        name = schema.name.rpartition("::")[2]
        changes = name.endswith("_") and not name.endswith("__")
        operation = schema.name.replace("::", ".")
        pointwise = torch.Tag.pointwise in func.tags
        return cls(operation, name.removesuffix("_") if changes else name, given, result, pointwise, changes)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, without the one that the result is written into."""
        given = [value for name, value in self.given.items() if name != "out"]
        return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return [leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor)]

    @property
    def input(self) -> Tensor:
        """The first tensor among the arguments."""
        return self.tensors[0]

    def axes(self, ndim: int, name: str = "dim") -> tuple[int, ...]:
        """Return the dimensions that an argument names, counted from the first; all if it names none."""
        value = self.given.get(name)
        if value is None or value == []:
            return tuple(range(ndim))
        values = value if isinstance(value, Sequence) else (value,)
        return tuple(int(axis) % ndim for axis in values) if ndim else ()


Rule: TypeAlias = Callable[[Tracing, Call], None]


def unknown(trace: Tracing, call: Call, reason: str = "an operation that is not known") -> None:
    """Nothing that goes into the call can be made smaller."""
    for tensor in call.tensors:
        for layer in trace.of(tensor).layers:
            trace.ledger.fix(layer, call.operation, reason)


def pointwise(trace: Tracing, call: Call) -> None:
    """Entries at the same place go together."""
    operands = [(trace.of(tensor), tuple(tensor.shape)) for tensor in call.tensors]
    for output in call.outputs:
        trace.set(output, combined(trace, call, operands, output.ndim))


def combined(
    trace: Tracing, call: Call, operands: Sequence[tuple[Labels, Sequence[int]]], ndim: int, reason: str = ""
) -> Labels:
    """Return the labels of what is computed from the entries of tensors at the same place, after broadcasting."""
    sides = [(labels, [1] * (ndim - len(shape)) + list(shape)) for labels, shape in operands if len(shape) <= ndim]
    layers: list[Layer] = []
    for index, (labels, _) in enumerate(sides):
        others = [side for number, side in enumerate(sides) if number != index]
        for layer in labels.layers:
            layers.append(_matched(trace, call, aligned(layer, ndim), labels.parametric or labels.weak, others, reason))
    return Labels(
        trace.ledger.merged(layers),
        parametric=all(labels.parametric or labels.uniform or not any(n > 1 for n in shape) for labels, shape in sides)
        and any(labels.parametric for labels, _ in sides),
        uniform=all(labels.uniform for labels, _ in sides),
        weak=all(labels.weak for labels, _ in sides if labels.layers),
    )


def _matched(
    trace: Tracing,
    call: Call,
    layer: Layer,
    is_shareable: bool,
    others: Sequence[tuple[Labels, Sequence[int]]],
    reason: str,
) -> Layer:
    """A layer without the axes along which another operand has entries that nothing can remove."""
    axes = [
        axis
        for axis in range(layer.ndim)
        if layer.shape[axis] > 1
        and any(
            shape[axis] > 1 and not labels.uniform and not _follows(layer, is_shareable, axis, labels)
            for labels, shape in others
        )
    ]
    reason = reason or "it is computed with values of fixed size"
    return trace.ledger.hold(layer, axes, call.operation, reason) if axes else layer


def _follows(layer: Layer, is_shareable: bool, axis: int, labels: Labels) -> bool:
    """Whether another operand can lose the same entries along an axis.

    A parameter that all heads share, such as a table of rotations, cannot lose what goes from one of them.
    """
    found = False
    for other in (aligned(entry, layer.ndim) for entry in labels.layers):
        if other.shape[axis] > 1:
            extra = [a > 1 and b == 1 for a, b in zip(layer.shape, other.shape, strict=True)]
            lacking = [b > 1 and a == 1 for a, b in zip(layer.shape, other.shape, strict=True)]
            theirs = labels.parametric or labels.weak
            is_shared = theirs and not is_shareable and any(extra)
            shares = is_shareable and not theirs and any(lacking)
            if is_shared or shares:
                return False
            found = True
    return found


def each_layer(labels: Labels, change: Callable[[Layer], Layer | None]) -> Labels:
    """Return labels with each layer changed, without those that None is returned for."""
    return labels.moved(made for layer in labels.layers if (made := change(layer)) is not None)


def fused(trace: Tracing, call: Call, labels: Labels, axes: Sequence[int], reason: str) -> Labels:
    """Return labels that do not vary along some axes: what is there goes together."""
    return each_layer(labels, lambda layer: trace.ledger.fuse(layer, axes, call.operation, reason))


def held(trace: Tracing, call: Call, labels: Labels, axes: Sequence[int], reason: str) -> Labels:
    """Return labels of a tensor of the same shape, whose entries along some axes go together."""
    return each_layer(labels, lambda layer: trace.ledger.hold(layer, axes, call.operation, reason))


def stopped(trace: Tracing, call: Call, labels: Labels, axes: Sequence[int], reason: str) -> Labels:
    """Return labels without the layers that vary along some axes: these are fixed."""

    def change(layer: Layer) -> Layer | None:
        if all(layer.shape[axis] == 1 for axis in axes):
            return layer
        trace.ledger.fix(layer, call.operation, reason)
        return None

    return each_layer(labels, change)


def pairs_of(value: Any) -> Iterator[int]:
    """Yield one integer, or those of a sequence."""
    yield from value if isinstance(value, Sequence) else (value,)
