"""Fold batch norms into the layers before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from secateur._errors import RecipeError
from secateur.calibration import Forward, call_model, load_batches, quiet
from secateur.folding._calls import Calls, calls_in, dimensions_of
from secateur.layers import check_model, is_sharded, own_behaviour, swap_modules_

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that is now part of a layer.

    Args:
        name: of the batch norm, which is an ``nn.Identity`` now.
        layer: name of the layer.
    """

    name: str
    layer: str


@dataclass(frozen=True)
class LeftNorm:
    """A batch norm that stays as it is.

    Args:
        name: of the batch norm.
        reason: why it stays.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """Which batch norms were folded, and which were not.

    Args:
        folded: in the order of the model.
        left: in the order of the model.
    """

    folded: tuple[FoldedNorm, ...]
    left: tuple[LeftNorm, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} of {len(self.folded) + len(self.left)} batch norms folded into layers"]
        lines += [f"{norm.name} stays: {norm.reason}" for norm in self.left]
        return "\n".join(lines)


def fold_(model: nn.Module, *, batches: Iterable[Any] | None = None, forward: Forward = call_model) -> FoldReport:
    """Fold the batch norms of a model, in place, into the convolutions and linear layers before them.

    In evaluation mode a batch norm multiplies each channel by a number and adds another one. A layer before it can do
    this with its weight and bias: ``W' = s W`` and ``b' = s (b - mean) + beta``, with ``s = gamma / sqrt(var + eps)``
    for each output. They are computed in float64, and rounded once. Zeros stay zeros, so that a pruned model can be
    folded before it is packed or exported. The batch norm becomes an ``nn.Identity``.

    Only the output of one layer that nothing else reads can be folded into. This is read off the code of the model,
    which torch.fx traces. A batch norm for which that cannot be shown stays, and the report says why: such as one that
    stands before its convolution, or behind an addition or an activation.

    A model that was folded can no longer be trained as before: its statistics are gone.

    Args:
        model: any module in evaluation mode.
        batches: inputs as for :func:`prune_`. They are needed only for batch norms behind linear layers, whose
            features they normalise only where inputs have two dimensions.
        forward: how to call the model on one of the ``batches``.

    Returns:
        A frozen report: each batch norm with the layer that it is part of now, or the reason why it stays.

    Raises:
        RecipeError: a batch norm is in training mode.
        StatisticsError: ``batches`` is empty.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> report = secateur.fold_(model)
        >>> [(norm.name, norm.layer) for norm in report.folded], model[1]
        ([('1', '0')], Identity())

    Reference:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, arXiv:1712.05877, section 3.2.
    """
    check_model(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    if training := next((name for name, norm in norms.items() if norm.training), None):
        raise RecipeError(
            f"{training} is in training mode; a batch norm can be folded only in evaluation mode, where its statistics "
            "do not change. Call model.eval() first."
        )
    calls = calls_in(model)
    dimensions = None if batches is None else _dimensions(model, list(norms.values()), batches, forward)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    places = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    folded: list[FoldedNorm] = []
    left: list[LeftNorm] = []
    for name, norm in norms.items():
        found = _layer_before(norm, model, calls, uses, places, names, dimensions)
        made = found if isinstance(found, str) else _fused(found, norm)
        if isinstance(made, str):
            left.append(LeftNorm(name, made))
            continue
        assert isinstance(found, nn.Module)
        _write_(found, *made)
        folded.append(FoldedNorm(name, names[id(found)]))
    done = {norm.name for norm in folded}
    swap_modules_(model, [(norm, nn.Identity().eval()) for name, norm in norms.items() if name in done])
    return FoldReport(tuple(folded), tuple(left))


def _dimensions(
    model: nn.Module, norms: list[nn.Module], batches: Iterable[Any], forward: Forward
) -> dict[int, set[int]]:
    loaded = load_batches(batches, next((p.device for p in model.parameters()), torch.device("cpu")))
    found, hooks = dimensions_of(norms)
    try:
        with quiet(model):
            for batch in loaded:
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _layer_before(
    norm: BatchNorm,
    model: nn.Module,
    calls: Calls,
    uses: Counter[int],
    places: Counter[int],
    names: dict[int, str],
    dimensions: dict[int, set[int]] | None,
) -> nn.Module | str:
    """The layer that a batch norm can be folded into, or the reason why there is none."""
    if (reason := _why_not_norm(norm)) is not None:
        return reason
    if norm is model:
        return "it is the model itself"
    found = calls.norms.get(id(norm), [])
    if not found:
        return calls.failures.get(id(norm), "the code of the model does not call it")
    if len(found) > 1 or places[id(norm)] > 1:
        return f"it is used {max(len(found), places[id(norm)])} times"
    layer = found[0].before
    if layer is None:
        return found[0].reason
    name = names[id(layer)]
    if type(layer) not in _LAYERS and (not isinstance(layer, _LAYERS) or own_behaviour(layer) is not None):
        return f"{name} before it is {type(layer).__name__}, which is no plain convolution or linear layer"
    if (reason := _why_not_layer(layer, calls, uses, places)) is not None:
        return f"{name} before it {reason}"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != norm.num_features:
        return f"{name} before it has {outputs} outputs, but it normalises {norm.num_features} channels"
    if isinstance(layer, nn.Linear) and (dimensions or {}).get(id(norm)) != {2}:
        return f"it normalises the outputs of {name} only where inputs have two dimensions; give batches that show it"
    return layer


def _why_not_norm(norm: BatchNorm) -> str | None:
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} may compute something else than the batch norm that it derives from"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it uses those of each batch"
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return "it has hooks or a forward of its own, which would be lost"
    if norm.running_mean.is_meta:
        return "it is on the meta device, without values"
    return None


def _why_not_layer(layer: Any, calls: Calls, uses: Counter[int], places: Counter[int]) -> str | None:
    count = max(calls.counts.get(id(layer), 0), places[id(layer)])
    if count > 1:
        return f"is used {count} times"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return "has hooks or a forward of its own, which see its output"
    if nn.utils.parametrize.is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "computes its weight"
    if any(uses[id(p)] > 1 for p in layer._parameters.values() if p is not None):
        return "shares its weight or bias"
    if any(is_sharded(p) for p in layer.parameters()):
        return "is sharded over processes"
    if layer.weight.is_meta or not layer.weight.is_floating_point():
        return "has no floating-point weight in memory"
    return None


@torch.no_grad()
def _fused(layer: Any, norm: BatchNorm) -> tuple[Tensor, Tensor] | str:
    """Weight and bias of a layer with its batch norm, or the reason why they cannot be had."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    scale, bias = scale.to(weight.device), bias.to(weight.device)
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...]
        by_group = weight.double().unflatten(0, (layer.groups, -1))
        made = (by_group * scale.view(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))).flatten(0, 1)
    else:
        made = weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1))
    made, bias = made.to(weight.dtype), bias.to(weight.dtype if layer.bias is None else layer.bias.dtype)
    if not (bool(made.isfinite().all()) and bool(bias.isfinite().all())):
        return "with it the weight or bias before it would not be finite"
    return made, bias


@torch.no_grad()
def _write_(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
