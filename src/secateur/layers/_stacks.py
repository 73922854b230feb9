"""Stacks of matrices in one parameter, such as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from torch import Tensor, nn

from secateur.layers._kind import LayerKind, as_it_is, turned
from secateur.layers._observed import Observed


def stacked_kinds(module: nn.Module) -> tuple[LayerKind, ...]:
    """Return the kinds of the matrices in a module's stacks, if the module shows how they are read.

    A stack is a parameter ``[matrices, out, in]`` or ``[matrices, in, out]``. Which of the two says an attribute
    ``is_transposed``, as modules of transformers have it, or else the sizes of two stacks of which one reads half as
    many features as the other gives, because these have a gate.
    """
    stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1}
    given = getattr(module, "is_transposed", None)
    is_transposed = given if isinstance(given, bool) else _by_sizes([tuple(p.shape) for p in stacks.values()])
    if is_transposed is None:
        return ()
    return tuple(kind for name, p in stacks.items() for kind in kinds_of_stack(name, len(p), is_transposed))


def kinds_of_stack(parameter: str, count: int, is_transposed: bool) -> Iterator[LayerKind]:
    """Yield the kinds of the matrices of one stack.

    Args:
        parameter: name of the attribute.
        count: of its matrices.
        is_transposed: whether they are ``[in, out]``.
    """
    view = turned if is_transposed else as_it_is
    for index in range(count):
        yield LayerKind(view, view, parameter=parameter, name=f"{parameter}.{index}", part=index)


def observed_kinds(name: str, parameter: nn.Parameter, observed: Observed) -> list[LayerKind]:
    """Return the kinds of a parameter of an unknown module: those of the matrices that a function multiplies."""
    reading = observed.read.get(id(parameter))
    if reading is None or reading.problem:
        return []
    view = turned if reading.is_transposed else as_it_is
    if reading.joined is not None:
        return [_joined(name, reading.joined, view)]
    if parameter.ndim == 3:
        return list(kinds_of_stack(name, len(parameter), reading.is_transposed))
    if not reading.parts:
        return [LayerKind(view, view, parameter=name, name=name)]
    return [
        LayerKind(view, view, parameter=name, name=f"{name}.{index}", part=slice(begin, end))
        for index, (begin, end) in enumerate(reading.parts)
    ]


def _joined(name: str, first: int, view: Callable[[nn.Module, Tensor], Tensor]) -> LayerKind:
    """The kind of a parameter of three dimensions, two of which are the inputs or the outputs of one matrix."""

    def back(module: nn.Module, matrix: Tensor) -> Tensor:
        return view(module, matrix).view_as(getattr(module, name))

    return LayerKind(
        lambda module, weight: view(module, weight.flatten(first, first + 1)), back, parameter=name, name=name
    )


def _by_sizes(shapes: list[tuple[int, ...]]) -> bool | None:
    """Whether matrices are ``[in, out]``, from the shapes of stacks that follow on one another; None if unclear."""
    found = set()
    for one, other in combinations(shapes, 2):
        for (count, a, b), (others, c, d) in ((one, other), (other, one)):
            if count == others and b == c and a == 2 * d:
                found.add(False)
            if count == others and a == d and b == 2 * c:
                found.add(True)
    return found.pop() if len(found) == 1 else None
