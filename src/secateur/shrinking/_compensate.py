"""What stays takes over from what goes: the matrices that read units get least-squares weights without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur._errors import SolverError, naming
from secateur.calibration import LayerStatistics
from secateur.layers import Layer
from secateur.patterns import Unstructured
from secateur.shrinking._consumers import Consumers, removed_columns
from secateur.solvers import LayerProblem, Refit, Solution, Solver, refit_columns


@dataclass(frozen=True)
class ConsumerError:
    """What a layer lost with the units that it read.

    Args:
        layer: its name.
        without: relative error of its output when units just go.
        with_fit: the same after what stays was fitted; None if it was not.
        note: why not, or what else there is to know.
    """

    layer: str
    without: float | None
    with_fit: float | None
    note: str = ""


@torch.no_grad()
def mask_and_fit_(
    consumers: Consumers,
    units: Mapping[str, Sequence[int]],
    gathered: Iterable[tuple[str, LayerStatistics | None]],
) -> list[ConsumerError]:
    """Write zeros into the columns that read units that go, layer by layer, and fit the others to make up for them.

    Args:
        consumers: of the model.
        units: by dimension, those that go.
        gathered: names of layers, each with the statistics of its inputs (``gram`` and ``input_mean``), which are those
            of the model as it is when it is asked for them. Layers that are not among them just lose their columns.
    """
    gone = {name: removed_columns(found, units) for name, found in consumers.by_layer.items()}
    gone = {name: columns for name, columns in gone.items() if columns.any()}
    errors = []
    for name, statistics in gathered:
        if name in gone:
            layer, columns = consumers.by_layer[name][0].layer, gone.pop(name)
            with naming(layer.title):
                if statistics is None:
                    errors.append(_drop_(layer, columns, "no calibration input reached it"))
                else:
                    errors.append(_fit_(layer, columns, statistics))
    return [*errors, *(_drop_(consumers.by_layer[name][0].layer, columns) for name, columns in gone.items())]


@torch.no_grad()
def fold_(consumers: Consumers, constants: Mapping[str, Tensor]) -> None:
    """Add what constant inputs give to the biases of layers.

    Args:
        consumers: of the model.
        constants: by the name of a layer, ``[in]``: the inputs.
    """
    for name, values in constants.items():
        layer = consumers.by_layer[name][0].layer
        bias = _bias_of(layer)
        if bias is not None and values.any():
            bias += (layer.matrix().double() @ values.to(layer.matrix().device)).to(bias.dtype)


def _drop_(layer: Layer, gone: Tensor, note: str = "") -> ConsumerError:
    weight = layer.matrix().clone()
    weight[:, gone.to(weight.device)] = 0
    layer.write_(weight)
    return ConsumerError(layer.name, None, None, note)


def _fit_(layer: Layer, gone: Tensor, statistics: LayerStatistics) -> ConsumerError:
    weight = layer.matrix()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    bias = _bias_of(layer)
    kept = ~gone
    mask = weight != 0
    is_sparse = float(mask[:, kept.to(mask.device)].double().mean()) < 0.95
    found = refit_columns(weight, statistics, kept, bias=bias is not None, weights=not is_sparse)
    new, note = found.weight, ""
    after = found.error_after
    if is_sparse:  # zeros that somebody made stay zero
        problem = LayerProblem(weight, statistics, Unstructured(), None)
        new = Refit(_Mask(mask & kept.to(mask.device))).solve(problem).weight
        note = "its zeros stayed"
        after = float((((weight - new).double() @ statistics.require("gram")[0].double()) * (weight - new)).sum())
        if bias is not None:
            mean = statistics.require("input_mean")[0].double()
            shift = (weight - new).double() @ mean
            after -= statistics.tokens * float(shift.square().sum())
            bias += shift.to(bias.dtype)
    elif bias is not None and found.bias_shift is not None:
        bias += found.bias_shift.to(bias.dtype)
    if not new.isfinite().all():
        raise SolverError("the fitted weights are not finite. Use a method without refit, or more calibration inputs.")
    layer.write_(new.to(layer.parameter.dtype))
    energy = found.energy or 1.0
    without = max(0.0, found.error_before / energy) ** 0.5
    return ConsumerError(layer.name, without, max(0.0, after / energy) ** 0.5, note)


def _bias_of(layer: Layer) -> Tensor | None:
    """The bias that is added to what the matrix gives, if it is a parameter of its own."""
    if layer.is_part or layer.kind.name:
        return None
    bias = getattr(layer.modules[0], "bias", None)
    fits = isinstance(bias, nn.Parameter) and bias.shape == (layer.matrix().shape[0],)
    return bias.data if fits and isinstance(bias, nn.Parameter) and len(layer.modules) == 1 else None


@dataclass(frozen=True)
class _Mask(Solver):
    """Keeps a mask that is given."""

    mask: Tensor
    needs = frozenset()

    def solve(self, problem: LayerProblem) -> Solution:
        return Solution(problem.weight * self.mask, self.mask, self.mask.to(problem.weight))
