"""The history of a model: the pattern that each layer was pruned to, from reports of earlier stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from secateur._checks import instance
from secateur.layers import Reading
from secateur.patterns import SparsityPattern, may_come_from, satisfied
from secateur.reports import LayerReport, RecoveryReport, Report, ShrinkReport, Stage

History: TypeAlias = Stage | Sequence[Stage]


def patterns_in(history: History) -> Mapping[str, SparsityPattern]:
    """Return the patterns that layers were pruned to, by name. The last report that has a layer counts."""
    return {layer.name: SparsityPattern.parse(layer.pattern) for layer in _layers(history)}


def _layers(history: History) -> Iterator[LayerReport]:
    for report in reports_in(history):
        if not isinstance(report, ShrinkReport | RecoveryReport):
            yield from instance("history", report, Report).layers


def reports_in(history: History) -> Sequence[Stage]:
    """Return the reports of a history in their order, also of one that is a single report."""
    return [history] if isinstance(history, Stage) else history


def readings_in(history: History, model: nn.Module) -> dict[int, Reading]:
    """Return how functions multiply parameters, by their id, for those that were pruned as one matrix or as several.

    A report has the shape ``[out, in]`` of each matrix, which is that of the parameter or the other way round. For a
    square one only a pattern can tell which: its zeros follow it one way, and not the other.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, dict[int | None, LayerReport]] = {}
    for layer in _layers(history):
        where, _, index = layer.name.rpartition(".")
        if layer.name in parameters:
            found.setdefault(layer.name, {})[None] = layer
        elif where in parameters and index.isdecimal():
            found.setdefault(where, {})[int(index)] = layer
    readings = {name: _reading(parameters[name], matrices) for name, matrices in found.items()}
    return {id(parameters[name]): reading for name, reading in readings.items() if reading is not None}


def _reading(parameter: Tensor, matrices: Mapping[int | None, LayerReport]) -> Reading | None:
    """How a parameter is read, given the reports of its matrices by their index; None if that is not clear."""
    first = next(iter(matrices.values()))
    pattern = SparsityPattern.parse(first.pattern)
    if None in matrices:
        if parameter.ndim != 2:
            return None
        is_transposed = _is_transposed(parameter, first.shape, pattern)
        return None if is_transposed is None else Reading("a report", is_transposed)
    in_order = [matrices[index] for index in sorted(index for index in matrices if index is not None)]
    if parameter.ndim == 3:
        is_transposed = _is_transposed(
            parameter[min(index for index in matrices if index is not None)], first.shape, pattern
        )
        return None if is_transposed is None else Reading("a report", is_transposed)
    if parameter.ndim != 2 or len({layer.shape for layer in in_order}) != 1:
        return None
    size = len(parameter) // len(in_order)
    is_transposed = _is_transposed(parameter[:size], first.shape, pattern)
    if is_transposed is None or size * len(in_order) != len(parameter):
        return None
    parts = tuple((begin, begin + size) for begin in range(0, len(parameter), size))
    return Reading("a report", is_transposed, parts)


def _is_transposed(matrix: Tensor, shape: tuple[int, int], pattern: SparsityPattern) -> bool | None:
    as_it_is, turned = tuple(matrix.shape) == shape, tuple(matrix.T.shape) == shape
    if as_it_is and turned:
        zero = matrix.detach() == 0
        as_it_is, turned = may_come_from(zero, pattern), may_come_from(zero.T, pattern)
    return None if as_it_is == turned else turned


def patterns_of(weight: Tensor, known: SparsityPattern | None) -> tuple[tuple[SparsityPattern, ...], bool]:
    """Return the patterns to pack a weight ``[out, in]`` with, and whether they were found from its zeros.

    Args:
        weight: the weight to pack.
        known: the pattern in the history, or None. It is used if the weight still has the zeros of this pattern.
    """
    zero = weight == 0
    if known is not None and may_come_from(zero, known):
        return (known,), False
    return satisfied(zero), True
