"""What stays takes over from what goes: the matrices that read units get least-squares weights without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur._errors import SolverError, naming
from secateur.calibration import LayerStatistics, Padding, StageSource, gather
from secateur.layers import Layer, Observed
from secateur.shrinking._consumers import Consumers, removed_columns
from secateur.solvers import LayerProblem, Refit, Solution, Solver, refit_columns
from secateur.patterns import Unstructured


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
    source: StageSource | None,
    observed: Observed,
    paddings: Sequence[Padding] | None,
    *,
    refit: bool,
    tell: Callable[[str], None] = lambda name: None,
) -> list[ConsumerError]:
    """Write zeros into the columns that read units that go, stage by stage, and fit the others to make up for them.

    Args:
        consumers: of the model.
        units: by dimension, those that go.
        source: of the stages, each on the outputs of those before it as they are now; None to fit nothing.
        observed: what a forward pass showed.
        paddings: what is padding in each batch.
        refit: fit the columns that stay, and the bias if there is one.
        tell: called with the name of each stage before it runs.
    """
    gone = {name: removed_columns(found, units) for name, found in consumers.by_layer.items()}
    gone = {name: columns for name, columns in gone.items() if columns.any()}
    if source is None:
        return [_drop_(consumers.by_layer[name][0].layer, columns) for name, columns in gone.items()]
    errors = []
    for index, stage in enumerate(source.stages):
        tell(stage.name)
        gathered = gather(source, index, {"gram", "input_mean"}, observed=observed, strict=False, paddings=paddings)
        for layer in stage.layers:
            statistics = gathered.pop(layer.name, None)
            if layer.name not in gone:
                continue
            with naming(layer.title):
                if statistics is None:
                    errors.append(_drop_(layer, gone.pop(layer.name), "no calibration input reached it"))
                else:
                    errors.append(_fit_(layer, gone.pop(layer.name), statistics, refit))
    for name, columns in gone.items():  # of no stage, such as a block that is left out
        errors.append(_drop_(consumers.by_layer[name][0].layer, columns, "no calibration input reached it"))
    return errors


def _drop_(layer: Layer, gone: Tensor, note: str = "") -> ConsumerError:
    weight = layer.matrix().clone()
    weight[:, gone.to(weight.device)] = 0
    layer.write_(weight)
    return ConsumerError(layer.name, None, None, note)


def _fit_(layer: Layer, gone: Tensor, statistics: LayerStatistics, refit: bool) -> ConsumerError:
    weight = layer.matrix()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    bias = _bias_of(layer)
    kept = ~gone
    mask = weight != 0
    is_sparse = float(mask[:, kept.to(mask.device)].double().mean()) < 0.95
    found = refit_columns(weight, statistics, kept, bias=bias is not None, weights=refit and not is_sparse)
    new, note = found.weight, ""
    after: float | None = found.error_after
    if not refit:
        found = refit_columns(weight, statistics, kept, bias=False, weights=False)
        new, after = found.weight, None
    elif is_sparse:  # zeros that somebody made stay zero
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
    return ConsumerError(layer.name, without, None if after is None else max(0.0, after / energy) ** 0.5, note)


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
