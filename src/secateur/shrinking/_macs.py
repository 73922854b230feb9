"""How many multiply-adds would be left without some units? Predicted, to choose how many go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.calibration import Forward, quiet
from secateur.graph import Graph
from secateur.reports import ModelSize


def macs_left(
    model: nn.Module, graph: Graph, batch: Any, forward: Forward, before: ModelSize
) -> Callable[[Mapping[str, Sequence[int]]], float]:
    """Return a function that predicts the fraction of the multiply-adds that is left when units go.

    Those of a layer are its rows times its weights, which lose what its tensors lose. What is left of the count, such
    as attention, falls with the number of heads.

    Args:
        model: to measure once.
        graph: of its units.
        batch: of inputs.
        forward: how to call the model on it.
        before: the count of the whole model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[str, int] = {}
    hooks = []

    def note(name: str, outputs: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                rows[name] = rows.get(name, 0) + output.numel() // outputs

        return hook

    weights: dict[str, nn.Parameter] = {}
    try:
        for module in model.modules():
            weight = getattr(module, "weight", None)
            outputs = next(
                (getattr(module, n) for n in ("out_features", "out_channels", "nf") if hasattr(module, n)), 0
            )
            if isinstance(weight, nn.Parameter) and weight.ndim > 1 and outputs and id(weight) in names:
                weights[names[id(weight)]] = weight
                hooks.append(module.register_forward_hook(note(names[id(weight)], outputs)))
        with quiet(model):
            forward(model, copy.deepcopy(batch))
    finally:
        for handle in hooks:
            handle.remove()
    own = {name: rows.get(name, 0) * weight.numel() for name, weight in weights.items()}
    total = before.macs or sum(own.values()) or 1
    rest = max(0, total - sum(own.values()))
    heads = sum(dimension.size for dimension in graph.of_kind("heads"))

    def left(units: Mapping[str, Sequence[int]]) -> float:
        shares = dict.fromkeys(own, 1.0)
        lost: dict[tuple[str, int], int] = {}
        for name, gone in units.items():
            for place in graph[name].places:
                lost[place.tensor, place.dim] = lost.get((place.tensor, place.dim), 0) + len(gone) * place.width
        for (tensor, dim), count in lost.items():
            if tensor in shares:
                shares[tensor] *= 1 - count / weights[tensor].shape[dim]
        gone_heads = sum(len(gone) for name, gone in units.items() if graph[name].kind == "heads")
        attention = rest * (1 - gone_heads / heads) if heads else rest
        return (sum(own[name] * share for name, share in shares.items()) + attention) / total

    return left
